// swift-tools-version: 6.2
import PackageDescription

// Download without a disk behind it, by links into the project: what an export's transfer costs alone.
let settings: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("NonisolatedNonsendingByDefault"),
    .treatAllWarnings(as: .error),
]

func module(_ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
    .target(name: name, dependencies: dependencies, swiftSettings: settings)
}

let package = Package(
    name: "flotilla-drain",
    targets: [
        .systemLibrary(name: "CCurl", pkgConfig: "libcurl"),
        .systemLibrary(name: "CDeflate", pkgConfig: "libdeflate"),
        .systemLibrary(name: "CLinux"),
        .systemLibrary(name: "COpenSSL", pkgConfig: "libcrypto"),
        .target(name: "CSHA256"),
        .systemLibrary(name: "CZstd", pkgConfig: "libzstd"),
        module("MigrationModel"),
        module("HostKit", ["MigrationModel", "CLinux", "COpenSSL", "CSHA256"]),
        module("DiskImage", ["MigrationModel", "HostKit", "CDeflate", "CLinux", "CZstd"]),
        module("Download", ["MigrationModel", "HostKit", "DiskImage", "CCurl"]),
        .executableTarget(name: "Drain", dependencies: ["Download", "HostKit"], swiftSettings: settings),
    ],
    swiftLanguageModes: [.v6]
)
