# What can be done here; `make` alone lists it. The scripts say what they install before they do it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

.PHONY: help build deb image demo test test-image test-images fuzz mutants bench fmt lint deny clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## the agent, as it is shipped
	cargo build --release --locked -p supernode-agent

deb: ## the Debian package, in target/debian
	@packaging/build-deb.sh

image: ## the QCOW2 for OpenNebula, in target/image; packaging/image/build-image.sh tells the choices
	@packaging/install-tools.sh image
	@packaging/image/build-image.sh "$$(packaging/build-deb.sh)" "$${CARGO_TARGET_DIR:-target}/image/supernode-base.qcow2"

demo: ## a node from an OpenNebula context on this machine, with a real Docker engine and a real Flower
	@packaging/demo/demo.sh

test: ## all tests; what is skipped is printed with the reason
	@tests/scripts/run-tests.sh

test-image: image ## that very QCOW2, booted under UEFI
	@packaging/install-tools.sh test-image
	@tests/machines/test-image.sh "$${CARGO_TARGET_DIR:-target}/image/supernode-base.qcow2"

test-images: ## the framework images base and sklearn, built without a registry and run as the agent runs them
	@packaging/install-tools.sh test-images
	@tests/scripts/test-images.sh

fuzz: ## every parser of foreign bytes, FUZZ_SECONDS (300) each
	@packaging/install-tools.sh fuzz
	@tests/scripts/fuzz.sh

mutants: ## how many changes of the pure modules their tests notice (hours); tests/scripts/mutants.sh FILE for one
	@packaging/install-tools.sh mutants
	@tests/scripts/mutants.sh

bench: ## the agent beside the raw API and the shell way: time, processes, memory, sizes, growth (15 minutes; SHORT=1: 3)
	@packaging/install-tools.sh bench
	@tests/scripts/bench.sh $(if $(SHORT),--short)

fmt: ## format the code
	cargo fmt --all
	cargo fmt --manifest-path tests/fuzz/Cargo.toml

lint: ## rustfmt, clippy, rustdoc and shellcheck, warnings denied
	@packaging/install-tools.sh lint
	cargo fmt --all --check
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps --locked --quiet
	git ls-files -z | xargs -0 grep -lE '^#!.*\b(ba)?sh$$' | xargs shellcheck

deny: ## licences, duplicates, sources and (where the database can be had) advisories of the dependencies
	@tests/scripts/cargo-deny.sh

clean: ## what was built; the cache outside the tree stays
	cargo clean
