import MigrationModel

/// One disk's progress: share, bytes, rate and time left. The rate is that of the last few seconds, so that a stall
/// shows; the first report sets the start, so that what was resumed does not count as speed.
struct ProgressBar {
    let title: String
    private var done: UInt64 = 0
    private var total: UInt64 = 0
    private var samples: [(at: ContinuousClock.Instant, done: UInt64)] = []
    private var first: (at: ContinuousClock.Instant, done: UInt64)?

    init(title: String) { self.title = title }

    /// - Parameter total: 0 where it is not known.
    mutating func update(done: UInt64, total: UInt64, written: UInt64, now: ContinuousClock.Instant) {
        // Something else is counted now.
        if total != self.total { (samples, first) = ([], nil) }
        (self.done, self.total) = (done, total)
        if first == nil { first = (now, done) }
        samples.append((now, done))
        samples.removeAll { $0.at < now - .seconds(5) }
    }

    /// Bytes per second over the last five seconds; over everything once it has ended.
    func rate(ended: Bool) -> Double? {
        guard let from = ended ? first : samples.first, let last = samples.last, last.done > from.done else {
            return nil
        }
        let seconds = Double((last.at - from.at).milliseconds) / 1000
        return seconds > 0 ? Double(last.done - from.done) / seconds : nil
    }

    /// One line: a terminal that wrapped it would be wiped at the wrong place.
    func text(width: Int, ended: Bool) -> String {
        guard total > 0 else {
            let right = "\(byteText(done))\(rate(ended: ended).map { "  \(byteText(UInt64($0)))/s" } ?? "")"
            return "\(title.cut(toColumns: width - right.count - 2))  \(right)"
        }
        let share = min(Double(done) / Double(total), 1)
        let rate = rate(ended: ended)
        var right = "\(Int(share * 100))%  \(byteText(done)) of \(byteText(total))"
        if let rate { right += "  \(byteText(UInt64(rate)))/s" }
        if !ended { right += "  ETA \(rate.map { Self.clock(Double(total - min(done, total)) / $0) } ?? "--:--")" }
        let title = title.cut(toColumns: width - right.count - 16)
        let room = max(width - title.columns - right.count - 6, 10)
        let filled = Int((share * Double(room)).rounded(.down))
        let bar = String(repeating: "#", count: filled) + String(repeating: "-", count: room - filled)
        return "\(title) [\(bar)]  \(right)"
    }

    /// "0:07", "1:02:30".
    static func clock(_ seconds: Double) -> String {
        let whole = Int(min(seconds.rounded(.up), 359_999))
        let (hours, minutes) = (whole / 3600, whole / 60 % 60)
        let rest = whole % 60
        let two = { (value: Int) in value < 10 ? "0\(value)" : "\(value)" }
        return hours > 0 ? "\(hours):\(two(minutes)):\(two(rest))" : "\(minutes):\(two(rest))"
    }
}
