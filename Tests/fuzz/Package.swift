// swift-tools-version: 6.2
import PackageDescription

// The disk engine on its own, by links into the project: without the packages that the rest needs it builds under a
// sanitizer or a fuzzer in a minute. Sources/FuzzVMDK is the only code that lives here. It links with nothing but the
// fuzzer, so it is a target only when FLOTILLA_FUZZ names the sanitizers to build everything with: "fuzzer".
let sanitizers = Context.environment["FLOTILLA_FUZZ"].map { ["-sanitize=\($0)"] }

let settings: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("NonisolatedNonsendingByDefault"),
    .treatAllWarnings(as: .error),
    .unsafeFlags(sanitizers ?? []),
]

func module(_ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
    .target(name: name, dependencies: dependencies, swiftSettings: settings)
}

let fuzzers: [Target] =
    sanitizers.map {
        [
            .executableTarget(
                name: "FuzzVMDK", dependencies: ["DiskImage", "HostKit", "MigrationModel"], swiftSettings: settings,
                linkerSettings: [.unsafeFlags($0 + ["-use-ld=lld"])])
        ]
    } ?? []

let package = Package(
    name: "flotilla-fuzz",
    targets: [
        .systemLibrary(name: "CBlkid", pkgConfig: "blkid"),
        .systemLibrary(name: "CCurl", pkgConfig: "libcurl"),
        .systemLibrary(name: "CDeflate", pkgConfig: "libdeflate"),
        .systemLibrary(name: "CLinux"),
        .systemLibrary(name: "CNBD", pkgConfig: "libnbd"),
        .target(name: "CSHA256"),
        .systemLibrary(name: "CZstd", pkgConfig: "libzstd"),
        .systemLibrary(name: "COpenSSL", pkgConfig: "libcrypto"),
        module("MigrationModel"),
        module("HostKit", ["MigrationModel", "CLinux", "COpenSSL", "CSHA256"]),
        module("DiskImage", ["MigrationModel", "HostKit", "CDeflate", "CLinux", "CZstd"]),
        module("Convert", ["MigrationModel", "HostKit", "DiskImage"]),
        module("Download", ["MigrationModel", "HostKit", "DiskImage", "CCurl"]),
        module("Volumes", ["MigrationModel", "HostKit", "DiskImage", "CBlkid", "CLinux", "CNBD"]),
        .target(name: "MutexForTSan"),
        .target(
            name: "TestKit", dependencies: ["MigrationModel", "HostKit", "MutexForTSan"],
            sources: ["TemporaryFolder.swift"], swiftSettings: settings),
        .testTarget(
            name: "DiskImageTests", dependencies: ["CLinux", "DiskImage", "HostKit", "MigrationModel", "TestKit"],
            swiftSettings: settings),
        .testTarget(
            name: "ConvertTests",
            dependencies: ["Convert", "DiskImage", "Download", "HostKit", "MigrationModel", "TestKit", "Volumes"],
            swiftSettings: settings),
    ] + fuzzers,
    swiftLanguageModes: [.v6]
)
