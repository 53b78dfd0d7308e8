//! The `dsc` command: see [`dsc::cli`].

fn main() -> std::process::ExitCode {
    dsc::cli::main()
}
