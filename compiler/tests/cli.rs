//! The `dsc` command as its users meet it: `broken` is every input we could think of that must be refused, `works` what must
//! work. All tests share one folder of artifacts, compiled once.

#[path = "cli/broken.rs"]
mod broken;
#[path = "cli/lab.rs"]
mod lab;
#[path = "cli/works.rs"]
mod works;
