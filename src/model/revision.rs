use std::{fmt, str::FromStr};

use super::Violation;

/// A state of the database: everything committed up to a position of its write-ahead log. Orders by
/// time; comparable within one database cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Revision {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        let read = u64::from_str_radix(text, 16).map(Self).ok();
        // One spelling each, signs and capitals excluded.
        read.filter(|revision| revision.to_string() == text)
            .ok_or_else(|| "must be a revision as a mutating call has answered it".into())
    }
}

/// How fresh an answer must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MinFreshness {
    /// As this replica knows it.
    #[default]
    Cached,
    /// With the effects of everything up to a revision.
    AtLeast(Revision),
    /// As the database has it now.
    FromDatabase,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_have_one_spelling_and_an_order() {
        let revision = Revision(0x16_b374_8d80);
        assert_eq!(revision.to_string(), "00000016b3748d80");
        assert_eq!(revision.to_string().parse(), Ok(revision));
        for bad in [
            "",
            "0",
            "00000016B3748D80",
            "+0000016b3748d80",
            "x",
            "0000000016b3748d80",
        ] {
            assert!(bad.parse::<Revision>().is_err(), "{bad}");
        }
        assert!(Revision(1) < Revision(2));
    }
}
