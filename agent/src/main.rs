//! The `supernode-agent` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    supernode_agent::cli::main()
}
