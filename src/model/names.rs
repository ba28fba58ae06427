use std::{fmt, str::FromStr};

use smol_str::SmolStr;

use super::Violation;

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $check:path) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(SmolStr);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }

            pub fn into_string(self) -> String {
                self.0.into()
            }
        }

        impl FromStr for $name {
            type Err = Violation;

            fn from_str(text: &str) -> Result<Self, Violation> {
                $check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// An e-mail address: ASCII, `local@domain`, at most 254 bytes (RFC 5321 §4.5.3.1).
    ///
    /// Kept as given, compared without regard to case.
    Email,
    check_email
);
name!(
    /// A login name: 3 to 32 of `a-z A-Z 0-9 _ . -`, beginning with a letter or a digit.
    ///
    /// Holds no `@`, so it never is an address. Kept as given, compared without regard to case.
    Username,
    check_username
);
name!(
    /// A person's name, at most 200 characters, without control characters. May be empty.
    FullName,
    check_full_name
);
name!(
    /// The name of a service account: 3 to 64 of `a-z A-Z 0-9 _ . -`, beginning with a letter or a
    /// digit. Kept as given, compared without regard to case.
    ServiceName,
    check_service_name
);
name!(
    /// The name of an API key, for its owner to tell it from others: 1 to 100 characters, without
    /// control characters.
    ApiKeyName,
    check_api_key_name
);
name!(
    /// The name of a tier: 1 to 32 of `a-z 0-9 _ -`, beginning with a letter.
    TierName,
    check_tier_name
);
name!(
    /// The name of a language model: 1 to 128 visible ASCII characters.
    ModelName,
    check_visible
);
name!(
    /// A client's id for a request that will use tokens: 1 to 128 visible ASCII characters.
    RequestId,
    check_visible
);

name!(
    /// What an e-mail address or a username begins with, in any case: 1 to 254 visible ASCII characters.
    NamePrefix,
    check_prefix
);

/// By what a person logs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identifier {
    Email(Email),
    Username(Username),
}

impl FromStr for Identifier {
    type Err = Violation;

    /// Takes what holds an `@` for an e-mail address: usernames cannot.
    fn from_str(text: &str) -> Result<Self, Violation> {
        if text.contains('@') {
            text.parse().map(Self::Email)
        } else {
            text.parse().map(Self::Username)
        }
    }
}

fn check_email(text: &str) -> Result<(), Violation> {
    const SHAPE: &str = "must be an e-mail address of the form local@domain, in ASCII";
    if text.len() > 254 {
        return Err("must be at most 254 bytes".into());
    }
    let (local, domain) = text.rsplit_once('@').ok_or(SHAPE)?;
    let local_ok = (1..=64).contains(&local.len())
        && local.split('.').all(|part| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+/=?^_`{|}~-".contains(&b))
        });
    let domain_ok = domain.contains('.')
        && domain.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
        });
    if local_ok && domain_ok {
        Ok(())
    } else {
        Err(SHAPE.into())
    }
}

fn check_username(text: &str) -> Result<(), Violation> {
    if is_handle(text, 32) {
        Ok(())
    } else {
        Err("must be 3 to 32 of a-z A-Z 0-9 _ . - and begin with a letter or a digit".into())
    }
}

fn check_service_name(text: &str) -> Result<(), Violation> {
    if is_handle(text, 64) {
        Ok(())
    } else {
        Err("must be 3 to 64 of a-z A-Z 0-9 _ . - and begin with a letter or a digit".into())
    }
}

fn is_handle(text: &str, max: usize) -> bool {
    (3..=max).contains(&text.len())
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn check_full_name(text: &str) -> Result<(), Violation> {
    if text.chars().count() > 200 {
        Err("must be at most 200 characters".into())
    } else if text.chars().any(char::is_control) {
        Err("must not hold control characters".into())
    } else {
        Ok(())
    }
}

fn check_api_key_name(text: &str) -> Result<(), Violation> {
    if !(1..=100).contains(&text.chars().count()) {
        Err("must be 1 to 100 characters".into())
    } else if text.chars().any(char::is_control) {
        Err("must not hold control characters".into())
    } else {
        Ok(())
    }
}

fn check_tier_name(text: &str) -> Result<(), Violation> {
    let ok = (1..=32).contains(&text.len())
        && text.as_bytes()[0].is_ascii_lowercase()
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b));
    if ok {
        Ok(())
    } else {
        Err("must be 1 to 32 of a-z 0-9 _ - and begin with a letter".into())
    }
}

fn check_visible(text: &str) -> Result<(), Violation> {
    if (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(())
    } else {
        Err("must be 1 to 128 visible ASCII characters".into())
    }
}

fn check_prefix(text: &str) -> Result<(), Violation> {
    if (1..=254).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(())
    } else {
        Err("must be at most 254 visible ASCII characters".into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses() {
        for good in ["a@b.co", "first.last+tag@sub.example.com", "A@B.CO"] {
            assert!(good.parse::<Email>().is_ok(), "{good}");
        }
        let long = format!("{}@{}.com", "a".repeat(64), "b".repeat(190));
        for bad in [
            "", "@", "a@", "@b.co", "a@b", "a b@c.de", "a@b..co", ".a@b.co", "a@-b.co", "ü@b.co",
            "a@b.co\n", "a@b@c.de", "\0@b.co", &long,
        ] {
            assert!(bad.parse::<Email>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_both_address_and_username(text in "\\PC{0,40}") {
            prop_assert!(text.parse::<Email>().is_err() || text.parse::<Username>().is_err());
        }

        #[test]
        fn accepted_names_fit_a_log_line(text in any::<String>()) {
            for ok in [
                text.parse::<Email>().map(|name| name.into_string()),
                text.parse::<Username>().map(|name| name.into_string()),
                text.parse::<FullName>().map(|name| name.into_string()),
                text.parse::<ServiceName>().map(|name| name.into_string()),
                text.parse::<ApiKeyName>().map(|name| name.into_string()),
                text.parse::<TierName>().map(|name| name.into_string()),
                text.parse::<ModelName>().map(|name| name.into_string()),
            ]
            .into_iter()
            .flatten()
            {
                prop_assert!(!ok.chars().any(char::is_control));
                prop_assert_eq!(&ok, &text);
            }
        }
    }
}
