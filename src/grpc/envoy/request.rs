//! The request that a gateway asks about.

use std::borrow::Cow;

use crate::{
    error::{Credential, Error, Fault, Result},
    grpc::{bearer, wire},
    proto::envoy::service::auth::v3::{AttributeContext, attribute_context::HttpRequest},
};

/// More headers than a gateway usually sends: no second look for room.
const USUAL_HEADERS: usize = 24;

/// What may carry an API key beside `authorization`, as clients of language models send it.
pub(super) const API_KEY: &str = "x-api-key";
pub(super) const AUTHORIZATION: &str = "authorization";

/// What is asked, where it lies in the message.
#[derive(Debug, Default)]
pub(super) struct Asked<'a> {
    /// Of the route.
    pub(super) extensions: Vec<(&'a str, &'a str)>,
    pub(super) headers: Headers<'a>,
}

impl<'a> Asked<'a> {
    pub(super) fn of(attributes: &'a AttributeContext) -> Self {
        let extensions = attributes.context_extensions.iter();
        Self {
            extensions: extensions.map(|(key, value)| (&**key, &**value)).collect(),
            headers: Headers::of(attributes),
        }
    }

    /// Reads a `CheckRequest`, if it is one that [`wire`] reads.
    pub(super) fn read(message: &'a [u8]) -> Option<Self> {
        let mut attributes = None;
        wire::read(message, |number, value| match number {
            1 => wire::once(&mut attributes, value.bytes()),
            _ => Some(()),
        })?;
        let (mut request, mut extensions) = (None, Vec::new());
        wire::read(attributes?, |number, value| {
            match number {
                4 => wire::once(&mut request, value.bytes())?,
                10 => extensions.push(wire::pair(value.bytes()?)?),
                _ => {}
            }
            Some(())
        })?;
        let mut http = None;
        wire::read(request.unwrap_or_default(), |number, value| match number {
            2 => wire::once(&mut http, value.bytes()),
            _ => Some(()),
        })?;
        Some(Self {
            extensions,
            headers: Headers::read(http.unwrap_or_default())?,
        })
    }
}

/// Its headers, names in lower case, in whichever form they came.
#[derive(Debug, Default)]
pub(super) struct Headers<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> Headers<'a> {
    pub(super) fn of(attributes: &'a AttributeContext) -> Self {
        let request = attributes.request.as_ref();
        let http = request.and_then(|request| request.http.as_ref());
        http.map(Self::of_http).unwrap_or_default()
    }

    fn of_http(http: &'a HttpRequest) -> Self {
        let joined = http.headers.iter();
        let joined = joined.map(|(key, value)| (lower(key), Cow::Borrowed(value.as_str())));
        let raw = http.header_map.iter().flat_map(|map| &map.headers);
        let raw = raw.map(|header| {
            let value = raw_or_text(&header.raw_value, &header.value);
            (lower(&header.key), value)
        });
        Self(joined.chain(raw).collect())
    }

    /// Reads an `HttpRequest`.
    fn read(http: &'a [u8]) -> Option<Self> {
        let (mut headers, mut raw) = (Vec::with_capacity(USUAL_HEADERS), None);
        wire::read(http, |number, value| {
            match number {
                3 => {
                    let (name, value) = wire::pair(value.bytes()?)?;
                    headers.push((lower(name), Cow::Borrowed(value)));
                }
                13 => wire::once(&mut raw, value.bytes())?,
                _ => {}
            }
            Some(())
        })?;
        // The first header is taken; of entries with one key the last one counts.
        headers.reverse();
        wire::read(raw.unwrap_or_default(), |number, header| {
            if number == 1 {
                let (mut key, mut value, mut raw_value) = (None, None, None);
                wire::read(header.bytes()?, |number, sent| match number {
                    1 => wire::once(&mut key, sent.text()),
                    2 => wire::once(&mut value, sent.text()),
                    3 => wire::once(&mut raw_value, sent.bytes()),
                    _ => Some(()),
                })?;
                let value = raw_or_text(raw_value.unwrap_or_default(), value.unwrap_or_default());
                headers.push((lower(key.unwrap_or_default()), value));
            }
            Some(())
        })?;
        Some(Self(headers))
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

fn lower(name: &str) -> Cow<'_, str> {
    if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(name.to_ascii_lowercase())
    } else {
        Cow::Borrowed(name)
    }
}

/// A gateway sends the one or the other.
fn raw_or_text<'a>(raw: &'a [u8], text: &'a str) -> Cow<'a, str> {
    if raw.is_empty() {
        Cow::Borrowed(text)
    } else {
        String::from_utf8_lossy(raw)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use prost::Message as _;

    use crate::proto::envoy::{
        config::core::v3::{HeaderMap, HeaderValue},
        service::auth::v3::{CheckRequest, attribute_context::Request},
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
                http.headers.insert((*name).to_owned(), (*value).to_owned());
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
                Headers::of(&attributes).credential().map(str::to_owned)
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
            Headers::of(&twice).credential(),
            Err(Error::Refused { .. })
        ));
        assert!(matches!(
            Headers::default().credential(),
            Err(Error::CredentialMissing)
        ));
    }

    #[test]
    fn grpc_is_told_from_its_relatives() {
        let is_grpc = |kind| {
            let attributes = attributes(&[("content-type", kind)], false);
            Headers::of(&attributes).is_grpc()
        };
        assert!(is_grpc("application/grpc") && is_grpc("application/grpc+proto"));
        assert!(!is_grpc("application/grpc-web") && !is_grpc("application/json"));
    }

    #[test]
    fn what_is_read_where_it_lies_is_what_the_generated_code_reads() {
        let headers = [
            (":path", "/chat"),
            ("Authorization", "Bearer x"),
            ("x-empty", ""),
            ("", "nameless"),
            ("x-ä", "ö"),
        ];
        for (is_raw, extensions) in [
            (false, &[][..]),
            (true, &[("tier", "starter"), ("empty", "")]),
            (false, &[("", "nameless")]),
        ] {
            let mut attributes = attributes(&headers, is_raw);
            let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
            attributes.context_extensions = extensions.iter().map(owned).collect();
            let sent = CheckRequest {
                attributes: Some(attributes.clone()),
            };
            let sent = sent.encode_to_vec();
            let sorted = |mut asked: Asked<'_>| {
                asked.extensions.sort_unstable();
                asked.headers.0.sort_unstable();
                format!("{asked:?}")
            };
            let read = Asked::read(&sent).expect("as encoders write");
            assert_eq!(sorted(read), sorted(Asked::of(&attributes)));
            // A second one would have to be merged.
            assert!(Asked::read(&[&sent[..], &sent].concat()).is_none());
        }
        assert!(Asked::read(&CheckRequest::default().encode_to_vec()).is_none());
    }

    #[test]
    fn of_entries_with_one_key_the_last_one_counts_as_in_a_map() {
        // Two messages in one: their fields come one after the other.
        let [one, two] = ["one", "two"].map(|id| {
            let attributes = attributes(&[("x-request-id", id)], false);
            let request = attributes.request.expect("set");
            request.http.expect("set").encode_to_vec()
        });
        let both = [one, two].concat();
        let read = Headers::read(&both).expect("as encoders write");
        let decoded = HttpRequest::decode(&*both).expect("valid");
        let decoded = Headers::of_http(&decoded);
        for headers in [read, decoded] {
            assert_eq!(headers.get("x-request-id"), Some("two"));
        }
    }
}
