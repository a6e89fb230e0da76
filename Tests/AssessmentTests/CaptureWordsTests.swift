import Assessment
import FlotillaProtocol
import SwiftProtobuf
import Testing

/// What only a capture can know decides as well.
@Suite struct CaptureWordsTests {
    @Test(arguments: [
        (Finding.Severity.blocked, Assessment.Verdict.blocked), (.warning, .warning), (.note, .ready),
    ])
    func decide(_ severity: Finding.Severity, _ verdict: Assessment.Verdict) throws {
        let manifest = AssessmentTests.manifest {
            $0.findings = [
                .with {
                    $0.severity = severity
                    $0.subject = "vm"
                    $0.message = "it is fault tolerant: a second VM runs in step with it"
                    $0.remedy = "turn Fault Tolerance off on the source"
                }
            ]
        }
        for hosts in [[], [AssessmentTests.host()]] {
            let vm = try AssessmentTests.assess(manifest, hosts: hosts)
            #expect(vm.verdict == verdict)
            let reason = vm.reasons.filter { $0.message.contains("fault tolerant") }
            #expect(
                reason.map(\.severity) == [verdict]
                    && reason.map(\.remedy) == ["turn Fault Tolerance off on the source"])
        }
    }
}
