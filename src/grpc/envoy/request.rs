//! The request that a gateway asks about.

use std::borrow::Cow;

use crate::{
    error::{Credential, Error, Fault, Result},
    grpc::bearer,
    proto::envoy::service::auth::v3::{AttributeContext, attribute_context::HttpRequest},
};

/// What may carry an API key beside `authorization`, as clients of language models send it.
pub(super) const API_KEY: &str = "x-api-key";
pub(super) const AUTHORIZATION: &str = "authorization";

/// Its headers, names in lower case, in whichever form they came.
#[derive(Debug, Default)]
pub(super) struct Headers<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> Headers<'a> {
    pub(super) fn of(attributes: Option<&'a AttributeContext>) -> Self {
        let http = attributes
            .and_then(|attributes| attributes.request.as_ref())
            .and_then(|request| request.http.as_ref());
        http.map(Self::of_http).unwrap_or_default()
    }

    fn of_http(http: &'a HttpRequest) -> Self {
        let lower = |name: &'a str| {
            if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
                Cow::Owned(name.to_ascii_lowercase())
            } else {
                Cow::Borrowed(name)
            }
        };
        let joined = http.headers.iter();
        let joined = joined.map(|pair| (lower(pair.key()), Cow::Borrowed(pair.value())));
        let raw = http.header_map.iter().flat_map(|map| &map.headers);
        let raw = raw.map(|header| {
            let value = match header.raw_value.is_empty() {
                true => Cow::Borrowed(header.value.as_str()),
                false => String::from_utf8_lossy(&header.raw_value),
            };
            (lower(&header.key), value)
        });
        Self(joined.chain(raw).collect())
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_ref())
    }

    /// The first value of a header.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        let named = self.0.iter().filter(move |(of, _)| of == name);
        named.map(|(_, value)| value.as_ref())
    }

    /// The access token or API key. Two are refused: whoever reads the other one would see another
    /// caller. A gateway joins values of one name by commas, which no credential holds.
    pub(super) fn credential(&self) -> Result<&str> {
        let authorization = self.all(AUTHORIZATION);
        let authorization = authorization.map(bearer::credential);
        let mut credentials = authorization.chain(self.all(API_KEY).map(Some));
        match (credentials.next(), credentials.next()) {
            (None, _) => Err(Error::CredentialMissing),
            (Some(Some(credential)), None) => Ok(credential),
            _ => Err(Error::Refused {
                credential: Credential::Token,
                fault: Fault::Invalid,
            }),
        }
    }

    /// Whether its client speaks gRPC, as a gateway tells.
    pub(super) fn is_grpc(&self) -> bool {
        self.get("content-type").is_some_and(|value| {
            let rest = value.strip_prefix("application/grpc");
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('+'))
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::proto::{
        Pair,
        envoy::{
            config::core::v3::{HeaderMap, HeaderValue},
            service::auth::v3::attribute_context::Request,
        },
    };

    /// A request in the one form or the other.
    pub(in super::super) fn attributes(headers: &[(&str, &str)], is_raw: bool) -> AttributeContext {
        let mut http = HttpRequest::default();
        for (name, value) in headers {
            if is_raw {
                let map = http.header_map.get_or_insert_with(HeaderMap::default);
                map.headers.push(HeaderValue {
                    key: (*name).to_owned(),
                    raw_value: value.as_bytes().to_vec(),
                    ..HeaderValue::default()
                });
            } else {
                http.headers.push(Pair::from((*name, *value)));
            }
        }
        AttributeContext {
            request: Some(Request { http: Some(http) }),
            ..AttributeContext::default()
        }
    }

    #[test]
    fn one_credential_is_read_wherever_it_is() {
        for is_raw in [false, true] {
            let read = |headers: &[(&str, &str)]| {
                let attributes = attributes(headers, is_raw);
                Headers::of(Some(&attributes))
                    .credential()
                    .map(str::to_owned)
            };
            assert_eq!(read(&[("authorization", "Bearer x")]).expect("read"), "x");
            assert_eq!(read(&[("Authorization", "bearer x")]).expect("read"), "x");
            assert_eq!(read(&[("x-api-key", "k")]).expect("read"), "k");
            assert!(matches!(read(&[]), Err(Error::CredentialMissing)));
            for refused in [
                &[("authorization", "Basic x")][..],
                &[("authorization", "x")],
                &[("authorization", "Bearer x"), ("x-api-key", "k")],
            ] {
                assert!(
                    matches!(read(refused), Err(Error::Refused { .. })),
                    "{refused:?}"
                );
            }
        }
        let twice = [("authorization", "Bearer x"), ("authorization", "Bearer y")];
        let twice = attributes(&twice, true);
        assert!(matches!(
            Headers::of(Some(&twice)).credential(),
            Err(Error::Refused { .. })
        ));
        assert!(matches!(
            Headers::of(None).credential(),
            Err(Error::CredentialMissing)
        ));
    }

    #[test]
    fn grpc_is_told_from_its_relatives() {
        let is_grpc = |kind| {
            let attributes = attributes(&[("content-type", kind)], false);
            Headers::of(Some(&attributes)).is_grpc()
        };
        assert!(is_grpc("application/grpc") && is_grpc("application/grpc+proto"));
        assert!(!is_grpc("application/grpc-web") && !is_grpc("application/json"));
    }
}
