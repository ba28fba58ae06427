//! What a route of a gateway asks of its requests.

use std::time::Duration;

use crate::{
    error::{Error, Result},
    grpc::{
        convert::{Fields, token_count},
        reservation,
    },
    model::{ApiKeyScopes, ModelName, TierName, Tiers, Tokens, Violation},
};

/// The field that stands for a key.
macro_rules! named {
    ($key:literal) => {
        concat!("context_extensions.", $key)
    };
}

/// The context extensions of a route, read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Route {
    /// Users of these may pass; empty: of all.
    pub(super) tiers: Vec<TierName>,
    /// All of these must an API key have. Whoever logged in has them.
    pub(super) scopes: ApiKeyScopes,
    pub(super) model: Option<ModelName>,
    /// Tokens that a request may use.
    pub(super) estimate: Option<Tokens>,
    pub(super) quota: Option<Quota>,
    /// The upstream is to see the credential.
    pub(super) forwards_credential: bool,
}

/// What becomes of the user's quota.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Quota {
    /// Enough must be left.
    Look,
    /// The estimate is held.
    Reserve {
        model: ModelName,
        tokens: Tokens,
        lifetime: Duration,
    },
}

const KEYS: [&str; 7] = [
    "tier",
    "scope",
    "model",
    "estimate",
    "quota",
    "lifetime",
    "credential",
];

impl Route {
    /// Reads the extensions. A key that is not known is refused: what is misspelt must not let pass.
    ///
    /// # Errors
    /// `Invalid`
    pub(super) fn read(extensions: &[(&str, &str)], tiers: &Tiers) -> Result<Self> {
        let mut fields = Fields::default();
        let text = |key: &str| {
            let named = extensions.iter().rfind(|(of, _)| *of == key);
            named.map(|(_, value)| *value)
        };
        if extensions.iter().any(|(key, _)| !KEYS.contains(key)) {
            let keys = KEYS.join(", ");
            let known = format!("must hold no other keys than {keys}");
            fields.take::<()>("context_extensions", Err(known.into()));
        }
        let allowed = text("tier").map(|list| {
            let names = list.split(',').map(str::trim);
            let names = names.map(|name| fields.known_tier(named!("tier"), name, tiers));
            names.collect::<Option<Vec<_>>>()
        });
        let scopes: Vec<String> = text("scope")
            .map(|list| list.split_whitespace().map(str::to_owned).collect())
            .unwrap_or_default();
        let scopes = match text("scope") {
            Some(_) if scopes.is_empty() => Err("must name a scope".into()),
            _ => ApiKeyScopes::parse(&scopes),
        };
        let scopes = fields.take(named!("scope"), scopes);
        let model = text("model").map(|model| fields.parse::<ModelName>(named!("model"), model));
        let estimate = text("estimate").map(|text| fields.take(named!("estimate"), tokens(text)));
        let lifetime = text("lifetime").map(|text| {
            let lifetime = reservation::lifetime_from(text);
            fields.take(named!("lifetime"), lifetime)
        });
        let forwards_credential = match text("credential") {
            None | Some("strip") => Some(false),
            Some("forward") => Some(true),
            Some(_) => fields.take(named!("credential"), Err("must be strip or forward".into())),
        };
        let (model, estimate) = (
            model.map_or(Some(None), all),
            estimate.map_or(Some(None), all),
        );
        let lifetime = lifetime.unwrap_or(Some(reservation::DEFAULT_LIFETIME));
        let quota = match text("quota") {
            None => Some(None),
            Some("look") => Some(Some(Quota::Look)),
            Some("reserve") => match (&model, estimate) {
                (Some(Some(model)), Some(Some(tokens @ 1..))) => lifetime.map(|lifetime| {
                    Some(Quota::Reserve {
                        model: model.clone(),
                        tokens,
                        lifetime,
                    })
                }),
                _ => {
                    let needs = "needs model and estimate, the estimate above 0, to reserve";
                    fields.take(named!("quota"), Err(needs.into()))
                }
            },
            Some(_) => fields.take(named!("quota"), Err("must be look or reserve".into())),
        };
        let read = || {
            Some(Self {
                tiers: allowed.unwrap_or(Some(Vec::new()))?,
                scopes: scopes?,
                model: model?,
                estimate: estimate?,
                quota: quota?,
                forwards_credential: forwards_credential?,
            })
        };
        fields.finish(read())
    }

    /// Holds a user of a tier to what the route asks for.
    ///
    /// # Errors
    /// `TierNotAllowed`
    pub(super) fn admit_tier(&self, tier: &TierName) -> Result<()> {
        if self.tiers.is_empty() || self.tiers.contains(tier) {
            Ok(())
        } else {
            Err(Error::TierNotAllowed)
        }
    }

    /// Holds an API key to what the route asks for.
    ///
    /// # Errors
    /// `ApiKeyScopeMissing`
    pub(super) fn admit_scopes(&self, scopes: &ApiKeyScopes) -> Result<()> {
        let missing = self.scopes.iter().find(|wanted| !scopes.contains(wanted));
        match missing {
            None => Ok(()),
            Some(scope) => Err(Error::ApiKeyScopeMissing(scope.to_owned())),
        }
    }
}

fn all<T>(read: Option<T>) -> Option<Option<T>> {
    read.map(Some)
}

fn tokens(text: &str) -> Result<Tokens, Violation> {
    token_count(text.parse().unwrap_or(-1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::load_tiers;

    fn read(extensions: &[(&str, &str)]) -> Result<Route, Vec<String>> {
        let tiers = load_tiers("".as_ref()).expect("the built-in ones");
        Route::read(extensions, &tiers).map_err(|error| match error {
            Error::Invalid(violations) => violations.0.into_iter().map(|one| one.field).collect(),
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn a_route_that_asks_for_nothing_lets_everybody_pass() {
        assert_eq!(read(&[]), Ok(Route::default()));
    }

    #[test]
    fn what_a_route_asks_for_is_read() {
        let route = read(&[
            ("tier", "starter, builder"),
            ("scope", "chat  embed"),
            ("model", "m-1"),
            ("estimate", "500"),
            ("quota", "reserve"),
            ("lifetime", "5m"),
            ("credential", "forward"),
        ]);
        let route = route.expect("valid");
        let name = |name: &str| name.parse::<TierName>().expect("valid");
        assert_eq!(route.tiers, [name("starter"), name("builder")]);
        assert!(route.admit_tier(&name("builder")).is_ok());
        assert!(matches!(
            route.admit_tier(&name("free")),
            Err(Error::TierNotAllowed)
        ));
        assert_eq!(route.scopes.names(), ["chat", "embed"]);
        assert_eq!(
            route.quota,
            Some(Quota::Reserve {
                model: "m-1".parse().expect("valid"),
                tokens: 500,
                lifetime: Duration::from_mins(5),
            })
        );
        assert!(route.forwards_credential);
    }

    #[test]
    fn an_api_key_must_have_every_scope() {
        let route = read(&[("scope", "chat embed")]).expect("valid");
        let scopes = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            ApiKeyScopes::parse(&names).expect("valid")
        };
        assert!(route.admit_scopes(&scopes(&["a", "chat", "embed"])).is_ok());
        for (has, missing) in [
            (&["chat"][..], "embed"),
            (&["embed"], "chat"),
            (&[], "chat"),
        ] {
            let refused = route.admit_scopes(&scopes(has));
            assert!(
                matches!(&refused, Err(Error::ApiKeyScopeMissing(scope)) if scope == missing),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn what_is_wrong_with_a_route_is_refused_by_name() {
        for (extensions, field) in [
            (&[("teir", "free")][..], "context_extensions"),
            (&[("tier", "no-such-tier")], "context_extensions.tier"),
            (&[("tier", "")], "context_extensions.tier"),
            (&[("scope", "")], "context_extensions.scope"),
            (&[("scope", "a\"b")], "context_extensions.scope"),
            (&[("model", "")], "context_extensions.model"),
            (&[("estimate", "-1")], "context_extensions.estimate"),
            (&[("estimate", "many")], "context_extensions.estimate"),
            (&[("quota", "yes")], "context_extensions.quota"),
            (&[("quota", "reserve")], "context_extensions.quota"),
            (
                &[("quota", "reserve"), ("model", "m"), ("estimate", "0")],
                "context_extensions.quota",
            ),
            (&[("lifetime", "2h")], "context_extensions.lifetime"),
            (&[("credential", "keep")], "context_extensions.credential"),
        ] {
            assert_eq!(
                read(extensions),
                Err(vec![field.to_owned()]),
                "{extensions:?}"
            );
        }
    }
}
