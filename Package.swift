// swift-tools-version: 6.2
import PackageDescription

let settings: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("NonisolatedNonsendingByDefault"),
    .treatAllWarnings(as: .error),
]

/// A system library found through pkg-config; `deploy/setup` installs the Debian package.
func system(_ name: String, _ pkgConfig: String, apt: String) -> Target {
    .systemLibrary(name: name, pkgConfig: pkgConfig, providers: [.apt([apt])])
}

func module(_ name: String, _ dependencies: [Target.Dependency] = []) -> Target {
    .target(name: name, dependencies: dependencies, swiftSettings: settings)
}

/// `data`: folders of test data, read from the source tree.
func tests(_ name: String, _ dependencies: [Target.Dependency], data: [String] = []) -> Target {
    .testTarget(name: name, dependencies: dependencies, exclude: data, swiftSettings: settings)
}

let grpc: Target.Dependency = .product(name: "GRPCCore", package: "grpc-swift-2")
let grpcInProcess: Target.Dependency = .product(name: "GRPCInProcessTransport", package: "grpc-swift-2")
let grpcProtobuf: Target.Dependency = .product(name: "GRPCProtobuf", package: "grpc-swift-protobuf")
let grpcHTTP2: Target.Dependency = .product(name: "GRPCNIOTransportHTTP2Posix", package: "grpc-swift-nio-transport")
let protobuf: Target.Dependency = .product(name: "SwiftProtobuf", package: "swift-protobuf")
let grdb: Target.Dependency = .product(name: "GRDB", package: "GRDB.swift")
let logging: Target.Dependency = .product(name: "Logging", package: "swift-log")
let x509: Target.Dependency = .product(name: "X509", package: "swift-certificates")
let crypto: Target.Dependency = .product(name: "Crypto", package: "swift-crypto")
let asn1: Target.Dependency = .product(name: "SwiftASN1", package: "swift-asn1")
let yaml: Target.Dependency = .product(name: "Yams", package: "Yams")
let arguments: Target.Dependency = .product(name: "ArgumentParser", package: "swift-argument-parser")

let package = Package(
    name: "flotilla",
    products: [.executable(name: "flotilla", targets: ["flotilla"])],
    dependencies: [
        .package(url: "https://github.com/grpc/grpc-swift-2", from: "2.4.3"),
        .package(url: "https://github.com/grpc/grpc-swift-protobuf", from: "2.4.1"),
        .package(url: "https://github.com/grpc/grpc-swift-nio-transport", from: "2.9.2"),
        .package(url: "https://github.com/apple/swift-protobuf", from: "1.39.0", traits: []),
        .package(url: "https://github.com/groue/GRDB.swift", from: "7.10.0"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
        .package(url: "https://github.com/apple/swift-certificates", from: "1.21.1"),
        .package(url: "https://github.com/apple/swift-crypto", from: "4.5.2"),
        .package(url: "https://github.com/apple/swift-asn1", from: "1.7.4"),
        .package(url: "https://github.com/jpsim/Yams", from: "6.2.2"),
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
    ],
    targets: [
        system("CBlkid", "blkid", apt: "libblkid-dev"),
        system("CCurl", "libcurl", apt: "libcurl4-openssl-dev"),
        system("CDeflate", "libdeflate", apt: "libdeflate-dev"),
        system("CLibvirt", "libvirt", apt: "libvirt-dev"),
        .systemLibrary(name: "CLinux"),
        system("CNBD", "libnbd", apt: "libnbd-dev"),
        system("CRabbitMQ", "librabbitmq", apt: "librabbitmq-dev"),
        .target(name: "CSHA256"),
        system("CZstd", "libzstd", apt: "libzstd-dev"),
        system("COpenSSL", "libcrypto", apt: "libssl-dev"),
        system("CXML", "libxml-2.0", apt: "libxml2-dev"),

        module("MigrationModel"),
        module("FlotillaProtocol", ["MigrationModel", protobuf, grpc, grpcProtobuf]),
        module("HostKit", ["MigrationModel", "CLinux", "COpenSSL", "CSHA256"]),
        module("Messaging", ["MigrationModel", "FlotillaProtocol", "HostKit", grpc, grpcProtobuf, protobuf, logging]),
        module("MessagingAMQP", ["MigrationModel", "HostKit", "Messaging", "CRabbitMQ"]),
        module(
            "Enrollment", ["MigrationModel", "HostKit", "Messaging", "MessagingAMQP", x509, crypto, asn1]),

        module("DiskImage", ["MigrationModel", "HostKit", "CDeflate", "CLinux", "CZstd"]),
        module("Export", ["MigrationModel", "FlotillaProtocol", "HostKit", "CXML", protobuf, yaml]),
        module("Convert", ["MigrationModel", "HostKit", "DiskImage"]),
        module("Download", ["MigrationModel", "HostKit", "DiskImage", "CCurl"]),
        module(
            "VSphere",
            ["MigrationModel", "FlotillaProtocol", "HostKit", "DiskImage", "Download", "Export", "CXML", protobuf]),
        module("Volumes", ["MigrationModel", "HostKit", "DiskImage", "CBlkid", "CLinux", "CNBD"]),
        module("Passthrough", ["MigrationModel", "FlotillaProtocol", "HostKit", "CLinux", protobuf]),
        module(
            "Deploy", ["MigrationModel", "FlotillaProtocol", "HostKit", "Passthrough", "CLibvirt", "CXML", protobuf]),

        module("Assessment", ["MigrationModel", "FlotillaProtocol", "Passthrough", protobuf]),
        module(
            "Worker",
            [
                "MigrationModel", "FlotillaProtocol", "HostKit", "Messaging", "Export", "DiskImage", "Download",
                "VSphere", "Convert", "Passthrough", "Deploy",
                grpc, grpcProtobuf, protobuf, logging,
            ]),
        module(
            "Coordinator",
            [
                "MigrationModel", "FlotillaProtocol", "HostKit", "Messaging", "Passthrough",
                grpc, grpcProtobuf, protobuf, grdb, logging,
            ]),
        module(
            "FlotillaCLI",
            [
                "MigrationModel", "FlotillaProtocol", "HostKit", "Messaging", "MessagingAMQP", "Enrollment", "Export",
                "DiskImage", "Convert", "Download", "Volumes", "VSphere", "Passthrough", "Deploy", "Assessment",
                "Worker", "Coordinator", "CLinux", grpc, grpcHTTP2, grpcInProcess, grpcProtobuf, protobuf, logging,
                yaml, arguments,
            ]),
        .executableTarget(name: "flotilla", dependencies: ["FlotillaCLI"], swiftSettings: settings),

        .executableTarget(
            name: "FleetBenchmark",
            dependencies: [
                "MigrationModel", "FlotillaProtocol", "HostKit", "Messaging", "MessagingAMQP", "Worker", "Coordinator",
                grpc, grpcInProcess, protobuf, logging, arguments,
            ],
            path: "Tests/benchmarks/fleet/FleetBenchmark", swiftSettings: settings),
        .target(
            name: "TestKit",
            dependencies: [
                "MigrationModel", "FlotillaProtocol", "HostKit", "Messaging", "Passthrough", grpc, protobuf,
            ],
            path: "Tests/TestKit", swiftSettings: settings),
        tests("MigrationModelTests", ["MigrationModel"]),
        tests(
            "MessagingTests", ["Messaging", "MigrationModel", "FlotillaProtocol", "TestKit", grpc, protobuf, logging]),
        tests(
            "MessagingAMQPTests", ["MessagingAMQP", "CRabbitMQ", "Messaging", "HostKit", "MigrationModel", "TestKit"]),
        tests("EnrollmentTests", ["Enrollment", "Messaging", "HostKit", "MigrationModel", "TestKit"]),
        tests("DiskImageTests", ["CLinux", "DiskImage", "HostKit", "MigrationModel", "TestKit"]),
        tests(
            "ConvertTests", ["Convert", "DiskImage", "Download", "HostKit", "MigrationModel", "TestKit", "Volumes"]),
        tests("AssessmentTests", ["Assessment", "Passthrough", "FlotillaProtocol", "MigrationModel", protobuf]),
        tests("ExportTests", ["Export", "FlotillaProtocol", "HostKit", "MigrationModel", "TestKit", protobuf]),
        tests(
            "VSphereTests",
            [
                "VSphere", "Download", "DiskImage", "Export", "FlotillaProtocol", "HostKit", "MigrationModel",
                "TestKit",
                protobuf,
            ]),
        tests(
            "PassthroughTests", ["Passthrough", "FlotillaProtocol", "HostKit", "MigrationModel", "TestKit", protobuf],
            data: ["Fixtures"]),
        tests(
            "DeployTests",
            ["Deploy", "Passthrough", "FlotillaProtocol", "HostKit", "MigrationModel", "TestKit", protobuf],
            data: ["Golden"]),
        tests(
            "WorkerTests",
            [
                "Worker", "Convert", "Deploy", "DiskImage", "Download", "Passthrough", "Messaging", "MigrationModel",
                "FlotillaProtocol", "HostKit", "TestKit", "VSphere", grpc, protobuf, logging,
            ]),
        tests(
            "CoordinatorTests",
            [
                "Coordinator", "Messaging", "MigrationModel", "FlotillaProtocol", "HostKit", "TestKit", grpc,
                grpcInProcess, protobuf, logging, grdb,
            ]),
        tests("IntegrationTests", ["MigrationModel", "FlotillaProtocol", "HostKit", "TestKit", protobuf]),
    ],
    swiftLanguageModes: [.v6]
)
