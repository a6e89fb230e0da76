package import FlotillaProtocol
package import HostKit
import MigrationModel
package import Passthrough
import SwiftProtobuf

/// Runs the baseline's benchmark in a guest, as often as it ran on the host, and compares the medians.
///
/// - Parameters:
///   - tolerance: how much worse the guest may be, in percent of the baseline.
///   - ask: sends a command to the guest's agent and returns its answer.
/// - Throws: `failedPrecondition` with both figures when the guest is slower than that, or when its output has no figure.
package func benchmarkGuest(
    _ baseline: GPUBaseline, tolerance: Double, stop: StopFlag, ask: (String) throws -> String
) throws -> GpuBenchmark {
    let hint = "install \(baseline.command[0]) and what it needs in the guest, or migrate without the benchmark"
    let figures = try baseline.figures.map { _ in
        try baseline.figure(
            in: runInGuest(
                baseline.command[0], Array(baseline.command.dropFirst()), to: "run benchmark \(baseline.name)",
                hint: hint, timeout: .seconds(baseline.limit), stop: stop, ask: ask))
    }
    let result = GpuBenchmark.with {
        $0.name = baseline.name
        $0.figure = median(figures)
        $0.baseline = baseline.figure
        $0.lossPercent = baseline.loss(of: median(figures))
        $0.tolerancePercent = tolerance
    }
    guard result.lossPercent <= tolerance else {
        throw MigrationError(
            .failedPrecondition, "the guest's GPU is too slow: \(result.text)",
            hint:
                "see that nothing else uses the host, its clocks are as when the baseline was recorded, and the guest "
                + "is pinned to the GPU's NUMA node; or allow more with --gpu-tolerance")
    }
    return result
}

extension GpuBenchmark {
    /// "gemm 1480.2, bare metal 1500 (1.3 % worse, 2 % allowed)".
    package var text: String {
        let percent = (abs(lossPercent) * 10).rounded() / 10
        return "\(name) \(figure), bare metal \(baseline) (\(percent) % \(lossPercent > 0 ? "worse" : "better"), "
            + "\(tolerancePercent) % allowed)"
    }
}
