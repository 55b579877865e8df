# Targets for development and release; `make` alone lists them. Scripts print what they install.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

.PHONY: help build deb image demo test test-image test-images fuzz mutants bench fmt lint deny clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build the release binary
	cargo build --release --locked -p supernode-agent

deb: ## build the Debian package in target/debian
	@packaging/build-deb.sh

image: ## build the OpenNebula QCOW2 image in target/image (options: packaging/image/build-image.sh)
	@packaging/install-tools.sh image
	@packaging/image/build-image.sh "$$(packaging/build-deb.sh)" \
		"$${CARGO_TARGET_DIR:-target}/image/supernode-base.qcow2"

demo: ## run a node on this machine from an OpenNebula context, with real Docker and Flower
	@packaging/demo/demo.sh

test: ## run all tests; skipped ones are listed with the reason
	@tests/scripts/run-tests.sh

test-image: image ## boot the QCOW2 image under UEFI
	@packaging/install-tools.sh test-image
	@tests/machines/test-image.sh "$${CARGO_TARGET_DIR:-target}/image/supernode-base.qcow2"

test-images: ## build the framework images base and sklearn and run them as the agent does
	@packaging/install-tools.sh test-images
	@tests/scripts/test-images.sh

fuzz: ## fuzz every parser of untrusted input, FUZZ_SECONDS (300) each
	@packaging/install-tools.sh fuzz
	@tests/scripts/fuzz.sh

mutants: ## mutation tests of the pure modules (hours; tests/scripts/mutants.sh FILE for one)
	@packaging/install-tools.sh mutants
	@tests/scripts/mutants.sh

bench: ## measure time, processes, memory and size against alternatives (15 min; SHORT=1: 3 min)
	@packaging/install-tools.sh bench
	@tests/scripts/bench.sh $(if $(SHORT),--short)

fmt: ## format the code
	cargo fmt --all
	cargo fmt --manifest-path tests/fuzz/Cargo.toml

lint: ## run rustfmt, clippy, rustdoc and shellcheck; check imports, words and line width
	@packaging/install-tools.sh lint
	cargo fmt --all --check
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps --document-private-items \
		--locked --quiet
	git ls-files -z | xargs -0 grep -lE '^#!.*\b(ba)?sh$$' | xargs shellcheck
	tests/scripts/check-imports.py
	tests/scripts/check-text.py

deny: ## check the dependencies' licences, duplicates, sources and advisories
	@tests/scripts/cargo-deny.sh

clean: ## remove build outputs; the cache outside the tree is kept
	cargo clean
