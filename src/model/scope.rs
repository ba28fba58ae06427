use std::{collections::BTreeSet, fmt, str::FromStr};

use super::Violation;

/// What a service account may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Ask whose token this is.
    TokensValidate,
    /// Book usage.
    UsageWrite,
    /// Read anybody's usage.
    UsageRead,
    /// Ask for quota.
    Quota,
    /// Speak as a gateway sidecar.
    Gateway,
    /// Call the administrators' RPCs.
    Admin,
}

impl Scope {
    pub const ALL: [Self; 6] = [
        Self::TokensValidate,
        Self::UsageWrite,
        Self::UsageRead,
        Self::Quota,
        Self::Gateway,
        Self::Admin,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::TokensValidate => "tokens.validate",
            Self::UsageWrite => "usage.write",
            Self::UsageRead => "usage.read",
            Self::Quota => "quota",
            Self::Gateway => "gateway",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for Scope {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        Self::ALL
            .into_iter()
            .find(|scope| scope.as_str() == text)
            .ok_or_else(|| {
                let names = Self::ALL.map(Self::as_str).join(", ");
                format!("must be one of {names}").into()
            })
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The scopes of one service account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScopeSet(BTreeSet<Scope>);

impl ScopeSet {
    /// Reads names of scopes, at least one; one named twice counts once.
    pub fn parse(names: &[String]) -> Result<Self, Violation> {
        if names.is_empty() {
            return Err("must hold at least one scope".into());
        }
        names.iter().map(|name| name.parse::<Scope>()).collect()
    }

    pub fn contains(&self, scope: Scope) -> bool {
        self.0.contains(&scope)
    }

    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(Scope::to_string).collect()
    }
}

impl FromIterator<Scope> for ScopeSet {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().collect())
    }
}
