//! How errors are told.
//!
//! ```text
//! error: bundle.dsc: it is not a dsc artifact
//!   caused by: ...                                (only what the line above does not say already)
//! help: give a file that `dsc compile` wrote
//! ```
//!
//! Libraries put a remedy behind the last `; ` or `: ` of a message, as an imperative, since they have one string to give;
//! [`report`] gives it a line of its own.

use std::error::Error;
use std::fmt::{self, Write};

/// An error of the command line itself.
#[derive(Debug)]
pub struct Failure {
    message: String,
    help: Option<String>,
}

impl Failure {
    /// One that says `message`.
    pub fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), help: None }
    }

    /// Adds a remedy.
    pub fn help(self, help: impl Into<String>) -> Failure {
        Failure { help: Some(help.into()), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}

/// An error, its causes and a remedy, as the user sees them.
pub fn report(error: &(dyn Error + 'static)) -> String {
    let message = error.to_string();
    let (sentence, mut remedy) = split_remedy(&message);
    let mut text = format!("error: {sentence}");
    let (mut cause, mut said) = (error.source(), message.clone());
    while let Some(e) = cause {
        let message = e.to_string();
        if !said.contains(&message) {
            // Writing to a string does not fail.
            let _ = write!(text, "\n  caused by: {message}");
            said = message;
        }
        cause = e.source();
    }
    if let Some(Failure { help: Some(help), .. }) = error.downcast_ref() {
        remedy = Some(help);
    }
    if let Some(remedy) = remedy {
        let _ = write!(text, "\nhelp: {remedy}");
    }
    text
}

/// What remedies start with.
const IMPERATIVES: [&str; 13] = [
    "ask",
    "compile",
    "copy",
    "did you mean",
    "download",
    "end",
    "feed",
    "give",
    "open",
    "run",
    "shorten",
    "update",
    "use",
];

/// Cuts the remedy off a message of one line.
fn split_remedy(message: &str) -> (&str, Option<&str>) {
    let starts_remedy =
        |rest: &str| IMPERATIVES.iter().any(|word| rest.strip_prefix(word).is_some_and(|r| r.starts_with(' ')));
    let places = message.rmatch_indices([';', ':']).filter(|(at, _)| message[at + 1..].starts_with(' '));
    let found = places.map(|(at, _)| at).find(|at| starts_remedy(&message[at + 2..]));
    match found {
        Some(at) if !message.contains('\n') => (&message[..at], Some(&message[at + 2..])),
        _ => (message, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_get_their_own_line() {
        let split = |text| split_remedy(text);
        assert_eq!(split("x has no y; give one"), ("x has no y", Some("give one")));
        assert_eq!(
            split("a context of 9 is beyond 8: shorten it, or compile again"),
            ("a context of 9 is beyond 8", Some("shorten it, or compile again"))
        );
        assert_eq!(split("no tensor `a`; did you mean `b`?").1, Some("did you mean `b`?"));
        for plain in ["a: b; c", "useless: used up", "x; given", "a\nb; give c", ""] {
            assert_eq!(split(plain), (plain, None));
        }
    }

    #[test]
    fn causes_are_told_once() {
        #[derive(Debug)]
        struct Outer(&'static str, Failure);
        impl fmt::Display for Outer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.0)
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.1)
            }
        }
        assert_eq!(
            report(&Outer("cannot read x: gone; give y", Failure::new("gone"))),
            "error: cannot read x: gone\nhelp: give y"
        );
        assert_eq!(report(&Outer("cannot start", Failure::new("gone"))), "error: cannot start\n  caused by: gone");
        assert_eq!(report(&Failure::new("bad").help("do better")), "error: bad\nhelp: do better");
    }
}
