import HostKit
import MigrationModel
import TestKit
import Testing

@testable import Passthrough

@Suite struct BaselineTests {
    func baseline(_ pattern: String? = nil, better: GPUBaseline.Better = .higher) -> GPUBaseline {
        GPUBaseline(name: "gemm", command: ["/opt/gemm"], pattern: pattern, better: better, figures: [90, 100, 110])
    }

    @Test(arguments: [
        (nil, "warm-up 3\nGFLOPS 1480.25 done\n", 1480.25),
        (nil, "1.5e3", 1500),
        ("GFLOPS: ([0-9.]+)", "size 8192\nGFLOPS: 12.5\nseconds 99\n", 12.5),
        ("^[0-9]+$", "a 1\n77\n", 77),
    ]) func figures(pattern: String?, output: String, figure: Double) throws {
        #expect(try baseline(pattern).figure(in: output) == figure)
    }

    @Test(arguments: [
        (nil, ""), (nil, "no GPU found"), (nil, "0"), ("GFLOPS: ([0-9.]+)", "1 2 3"), ("GFLOPS: (.+)", "GFLOPS: nan"),
        ("x([0-9])?", "x"),
    ]) func outputWithoutFigure(pattern: String?, output: String) {
        let error = #expect(throws: MigrationError.self) { try baseline(pattern).figure(in: output) }
        #expect(error?.code == .failedPrecondition)
        #expect(error?.message.contains("benchmark gemm") == true)
    }

    /// A pattern that ends within a number.
    @Test(arguments: ["bw: 1,234.5 GB/s", "bw: 1'234", "bw: 1.5.2"]) func aPartOfAFigure(_ output: String) {
        let error = #expect(throws: MigrationError.self) { try baseline("bw: ([0-9]+)").figure(in: output) }
        #expect(error?.message.contains("only a part of a figure") == true)
    }

    /// What may be a part of another figure is none.
    @Test(arguments: ["1,234.5 GB/s", "-5", "score 1'200", "1.2.3"]) func partsOfFigures(_ output: String) throws {
        let error = #expect(throws: MigrationError.self) { try baseline(nil).figure(in: output) }
        #expect(error?.hint?.contains("--pattern") == true)
    }

    @Test func losses() {
        #expect(baseline().figure == 100)
        #expect(baseline().loss(of: 98) == 2)
        #expect(baseline().loss(of: 105) == -5)
        #expect(baseline(better: .lower).loss(of: 105) == 5)
        #expect(median([4, 1, 3, 2]) == 2.5)
    }

    @Test func keptListedAndForgotten() throws {
        let folder = try TemporaryFolder()
        let baselines = GPUBaselines(folder: folder.path)
        #expect(try baselines.all().isEmpty)
        try baselines.save(baseline())
        #expect(try baselines.read("gemm") == baseline())
        #expect(try baselines.all() == [baseline()])
        try baselines.remove("gemm")
        #expect(#expect(throws: MigrationError.self) { try baselines.read("gemm") }?.code == .notFound)
        #expect(throws: MigrationError.self) { try baselines.remove("gemm") }
    }

    @Test(arguments: ["", ".hidden", "../x", "a/b", "-x", String(repeating: "a", count: 65), "ü"])
    func namesThatAreNone(name: String) {
        let error = #expect(throws: MigrationError.self) { try GPUBaselines(folder: "/nowhere").read(name) }
        #expect(error?.code == .invalidArgument)
    }

    @Test(arguments: ["", "{", "{\"name\":\"gemm\"}"]) func damaged(text: String) throws {
        let folder = try TemporaryFolder()
        let baselines = GPUBaselines(folder: folder.path)
        try baselines.save(baseline())
        try Files.writeAtomically(Array(text.utf8), to: "\(folder.path)/baselines/gemm.json")
        #expect(#expect(throws: MigrationError.self) { try baselines.read("gemm") }?.code == .dataLoss)
    }

    @Test func refusals() {
        #expect(throws: MigrationError.self) { try GPUBaseline(name: "gemm", command: []).validate() }
        #expect(throws: MigrationError.self) { try GPUBaseline(name: "gemm", command: ["a\0b"]).validate() }
        #expect(throws: MigrationError.self) { try baseline("(").validate() }
    }
}
