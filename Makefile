# Everything here is one command; `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GUEST := $(CURDIR)/.demo/guest
SWIFT_SOURCES = $(shell find Sources Tests -name '*.swift' -not -path '*/Generated/*') Package.swift

.PHONY: help setup build demo demo-fleet test test-disk test-asan test-tsan test-kill test-faults test-bus test-protocol test-vsphere test-vfio fuzz \
	bench-disk bench-export bench-fleet bench-gpu format lint protos protos-check clean

help: ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

setup: ## install the Debian packages for building and testing
	deploy/setup --test

build: ## build the flotilla binary (release; hosts need no Swift for it)
	deploy/setup --build
	swift build -c release --static-swift-stdlib --product flotilla

demo: ## migrate two virtual machines into a private libvirt and boot them
	Tests/testbeds/demo/run

demo-fleet: ## migrate three virtual machines through RabbitMQ and the workers of three hosts
	Tests/testbeds/demo-fleet/run

test: ## build everything with warnings as errors and run all tests
	deploy/setup --test
	Tests/testbeds/guest/build --out $(GUEST)
	swift build --build-tests
	FLOTILLA_TEST_GUEST=$(GUEST) FLOTILLA_TEST_BIN=$$(swift build --show-bin-path)/flotilla \
		swift test --skip-build --no-parallel

test-faults: ## break a fleet in every way we know and check what is left; FAULTS="case…" chooses
	Tests/faults/run $(FAULTS)

test-vfio: ## bind, release and migrate onto devices of an emulated IOMMU; FAST=1 or CASES="case…" for less
	deploy/setup --test
	swift build --product flotilla
	Tests/vfio/run $(if $(FAST),--fast) $$(swift build --show-bin-path)/flotilla $(CASES)

NODES ?= 1 3
test-bus: ## run the message bus's tests in process, on one broker and on a cluster of three
	deploy/setup --test
	swift build --build-tests
	for nodes in $(NODES); do \
		FLOTILLA_TEST_BROKERS=$$nodes swift test --skip-build --no-parallel --filter '$(or $(BUS),MessagingAMQPTests)'; \
	done

test-protocol: ## check the protocol's documents, vectors and Python examples with a real fleet
	deploy/setup --test
	Tests/testbeds/guest/build --out $(GUEST)
	swift build --product flotilla
	protocol/check --flotilla $$(swift build --show-bin-path)/flotilla
	FLOTILLA=$$(swift build --show-bin-path)/flotilla Tests/testbeds/protocol/run

test-vsphere: ## compare inventories of simulated vCenters with pyvmomi's, break exports from them in every way we know
	deploy/setup --test
	swift build --product flotilla
	Tests/testbeds/vsphere/crosscheck $$(swift build --show-bin-path)/flotilla
	Tests/testbeds/vsphere/faults $$(swift build --show-bin-path)/flotilla
	Tests/testbeds/vsphere/faults --esx $$(swift build --show-bin-path)/flotilla
	Tests/testbeds/vsphere/fleet $$(swift build --show-bin-path)/flotilla

SEEDS ?= 200
test-disk: ## run the disk engine's tests at length: the full format matrix, SEEDS (200) random disks
	FLOTILLA_MATRIX=full FLOTILLA_SEEDS=$(SEEDS) \
		swift test --package-path Tests/fuzz --scratch-path .build/disk --no-parallel

test-asan: ## run the disk engine's tests under AddressSanitizer
	LSAN_OPTIONS=suppressions=$(CURDIR)/Tests/fuzz/lsan.supp:print_suppressions=0 \
		swift test --package-path Tests/fuzz --scratch-path .build/address --sanitize address --no-parallel

test-tsan: ## run the disk engine's tests under ThreadSanitizer
	swift test --package-path Tests/fuzz --scratch-path .build/thread --sanitize thread --no-parallel

KILLS ?= 50
test-kill: ## kill disk conversions KILLS (50) times at random moments and continue them
	swift build --product flotilla
	Tests/kill/run --kills $(KILLS) $$(swift build --show-bin-path)/flotilla

FUZZ_SECONDS ?= 60
fuzz: ## fuzz the VMDK readers for FUZZ_SECONDS (60)
	Tests/fuzz/run --seconds $(FUZZ_SECONDS)

bench-disk: build ## compare disk conversion with qemu-img and a bare C loop (about 45 GB, 25 minutes)
	Tests/benchmarks/disk/run

bench-export: build ## compare exports from a simulated vCenter with curl, inventories with govmomi (about 15 GB, 15 minutes)
	Tests/benchmarks/export/run

bench-gpu: build ## measure gpu list on 64 GPUs, and the deploy stage beside libvirt's own time
	Tests/benchmarks/gpu/run .build/release/flotilla

bench-fleet: ## compare the fleet's rate with Celery's on the same broker; latency, waves, 1,000 hosts, memory
	deploy/setup --test
	swift build -c release --static-swift-stdlib --product FleetBenchmark
	Tests/benchmarks/fleet/run

format: ## format all Swift code
	@swift format -i --configuration .swift-format $(SWIFT_SOURCES)

lint: ## check the format of all Swift code
	@swift format lint --strict --configuration .swift-format $(SWIFT_SOURCES)

protos: ## regenerate the protocol's Swift code
	deploy/setup --build --protos
	protocol/generate

protos-check: ## check that the committed protocol code is what protoc makes
	deploy/setup --build --protos
	protocol/generate --check

clean: ## remove build products and the demo's files
	if [ -d .demo/libvirt ]; then Tests/testbeds/libvirt/run stop --dir .demo/libvirt; fi
	rm -rf .build .demo 2>/dev/null || sudo rm -rf .build .demo
