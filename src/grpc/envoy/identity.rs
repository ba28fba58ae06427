//! How an upstream is told who calls.

use super::{
    Said,
    request::{API_KEY, AUTHORIZATION, Headers},
};
use crate::auth::{UserCredential, Validated};

/// What begins so is ours to say: a client's own never reaches the upstream.
const PREFIX: &str = "x-user-";

/// The headers that may be set, and what metadata calls the same.
const NAMES: [(&str, &str); 7] = [
    ("x-user-id", "user_id"),
    ("x-user-tier", "tier"),
    ("x-user-role", "role"),
    ("x-user-credential", "credential"),
    ("x-user-session-id", "session_id"),
    ("x-user-api-key-id", "api_key_id"),
    ("x-user-scopes", "scopes"),
];

/// Who calls, in the words of [`NAMES`].
#[derive(Debug)]
pub(super) struct Identity([Option<String>; NAMES.len()]);

impl From<&Validated> for Identity {
    fn from(validated: &Validated) -> Self {
        let user = validated.user();
        let (kind, session, key) = match validated.credential() {
            UserCredential::Session(id) => ("session", Some(id.to_string()), None),
            UserCredential::ApiKey(id) => ("api_key", None, Some(id.to_string())),
        };
        let scopes = validated.api_key().map(|key| key.scopes.names().join(" "));
        Self([
            Some(user.id.to_string()),
            Some(user.tier.to_string()),
            Some(validated.role().as_str().to_owned()),
            Some(kind.to_owned()),
            session,
            key,
            // An empty header may be dropped, and then the client's own would stay.
            scopes.filter(|scopes| !scopes.is_empty()),
        ])
    }
}

impl Identity {
    fn said(&self) -> impl Iterator<Item = (&(&'static str, &'static str), &String)> {
        let said = NAMES.iter().zip(&self.0);
        said.filter_map(|(names, value)| Some((names, value.as_ref()?)))
    }

    /// The headers to set.
    pub(super) fn headers(&self) -> impl Iterator<Item = Said> {
        let said = self.said();
        said.map(|((header, _), value)| (*header, value.clone()))
    }

    /// The same as metadata.
    pub(super) fn into_metadata(self) -> impl Iterator<Item = Said> {
        let said = NAMES.iter().zip(self.0);
        said.filter_map(|((_, key), value)| Some((*key, value?)))
    }

    /// The headers to remove: those of ours that are not set, and what the client sent that looks like
    /// one. Never one that is set, for gateways remove after they set. Upstreams behind CGI or WSGI
    /// take an underscore for a hyphen.
    pub(super) fn removed(&self, sent: &Headers<'_>, forwards_credential: bool) -> Vec<String> {
        let is_set = |name: &str| self.said().any(|((header, _), _)| *header == name);
        let ours = NAMES.iter().map(|(header, _)| *header);
        let alike = sent.names().filter(|name| looks_like_ours(name));
        let mut removed = Vec::with_capacity(NAMES.len() + 2);
        removed.extend(ours.chain(alike).filter(|name| !is_set(name)));
        if !forwards_credential {
            removed.extend([AUTHORIZATION, API_KEY]);
        }
        removed.sort_unstable();
        removed.dedup();
        removed.into_iter().map(str::to_owned).collect()
    }
}

fn looks_like_ours(name: &str) -> bool {
    let bytes = name.bytes();
    let hyphened = bytes.map(|byte| if byte == b'_' { b'-' } else { byte });
    hyphened.take(PREFIX.len()).eq(PREFIX.bytes())
}

#[cfg(test)]
mod tests {
    use super::{super::request::tests::attributes, *};

    fn identity() -> Identity {
        let said = |text: &str| Some(text.to_owned());
        let (id, tier) = (said("1"), said("free"));
        Identity([
            id,
            tier,
            said("user"),
            said("session"),
            said("s"),
            None,
            None,
        ])
    }

    #[test]
    fn what_a_client_says_about_itself_is_removed() {
        for is_raw in [false, true] {
            let sent = attributes(
                &[
                    ("x-user-id", "admin"),
                    ("X-User-Admin", "yes"),
                    ("x_user_id", "admin"),
                    ("x-user_tier", "advanced"),
                    ("x-user-scopes", "all"),
                    ("x-username", "kept"),
                    ("accept", "kept"),
                ],
                is_raw,
            );
            let removed = identity().removed(&Headers::of(&sent), true);
            assert_eq!(
                removed,
                [
                    "x-user-admin",
                    "x-user-api-key-id",
                    "x-user-scopes",
                    "x-user_tier",
                    "x_user_id"
                ]
            );
        }
    }

    #[test]
    fn nothing_that_is_set_is_removed_and_the_rest_of_ours_is_even_unseen() {
        // A gateway that is set to send only some headers still removes them all.
        let removed = identity().removed(&Headers::default(), false);
        let all: Vec<&str> = NAMES.iter().map(|(header, _)| *header).collect();
        for name in all {
            let is_set = identity().headers().any(|(header, _)| header == name);
            assert_ne!(
                is_set,
                removed.iter().any(|removed| removed == name),
                "{name}"
            );
        }
        assert!(removed.iter().any(|name| name == "authorization"));
        assert!(removed.iter().any(|name| name == "x-api-key"));
    }
}
