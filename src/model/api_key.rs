use std::collections::BTreeSet;

use chrono::{DateTime, Utc};

use super::{ApiKeyId, ApiKeyName, User, UserId, Violation};

/// A credential that a user made for a program of theirs. The key itself is not kept.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiKey {
    pub id: ApiKeyId,
    pub user_id: UserId,
    pub name: ApiKeyName,
    pub scopes: ApiKeyScopes,
    pub created_at: DateTime<Utc>,
    /// `None`: never.
    pub expires_at: Option<DateTime<Utc>>,
    pub revoked_at: Option<DateTime<Utc>>,
    /// Behind by about a minute.
    pub last_used_at: Option<DateTime<Utc>>,
}

/// An API key and its user as they stand now.
#[derive(Clone, Debug)]
pub struct ApiKeyStanding {
    pub key: ApiKey,
    pub user: User,
}

/// What an API key may do where it is used, in words of the application: they mean nothing here.
///
/// At most [`Self::MAX`] scope tokens (RFC 6749 §3.3) of at most [`Self::MAX_CHARS`] characters, in
/// the order of ASCII, each once. May be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiKeyScopes(BTreeSet<String>);

impl ApiKeyScopes {
    pub const MAX: usize = 32;
    pub const MAX_CHARS: usize = 64;

    /// Reads scope tokens; one named twice counts once.
    pub fn parse(names: &[String]) -> Result<Self, Violation> {
        if names.len() > Self::MAX || !names.iter().all(|name| is_scope_token(name)) {
            let (max, chars) = (Self::MAX, Self::MAX_CHARS);
            return Err(format!(
                "must be at most {max}, each 1 to {chars} visible ASCII characters but \" and \\"
            )
            .into());
        }
        Ok(Self(names.iter().cloned().collect()))
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    pub fn names(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }
}

/// RFC 6749 §3.3: `scope-token = 1*( %x21 / %x23-5B / %x5D-7E )`.
fn is_scope_token(text: &str) -> bool {
    (1..=ApiKeyScopes::MAX_CHARS).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(names: &[&str]) -> Result<ApiKeyScopes, Violation> {
        ApiKeyScopes::parse(
            &names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn scopes_are_scope_tokens() {
        assert_eq!(
            parse(&["write:all", "read", "!#[]~", "read"])
                .expect("valid")
                .names(),
            ["!#[]~", "read", "write:all"]
        );
        assert!(parse(&[]).is_ok() && parse(&[&"x".repeat(64)]).is_ok());
        for bad in ["", "a b", "a\"b", "a\\b", "ü", "a\n", "\0", &"x".repeat(65)] {
            assert!(parse(&["read", bad]).is_err(), "{bad:?}");
        }
        assert!(parse(&["x"; 32]).is_ok() && parse(&["x"; 33]).is_err());
    }
}
