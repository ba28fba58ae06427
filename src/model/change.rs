use super::UserId;

/// Something that answers given before may contradict now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A user's state, tier, role, sessions or API keys.
    User(UserId),
    /// A user's own limit or credits. What the tier allows changes with the user.
    Quota(UserId),
    /// There is a new API key: what was unknown may be one now.
    NewApiKey,
    /// Any service account or key; they are few.
    Services,
    /// More than can be named.
    All,
}
