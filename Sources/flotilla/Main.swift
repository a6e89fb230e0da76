import FlotillaCLI

@main
struct Main {
    static func main() async { await Flotilla.start() }
}
