//! Gateways that speak the protocols of the Envoy API: who a request is from, and whether its user may
//! use tokens.
//!
//! Handlers convert and call; what is decided between is pure. `docs/gateway.md` is the contract with
//! whoever configures a gateway.

mod afterwards;
mod authorization;
mod denial;
mod descriptor;
mod identity;
mod limits;
mod rate_limit;
mod request;
mod route;
mod work;

pub use afterwards::Afterwards;
pub(super) use authorization::check_at_once;
pub(super) use rate_limit::should_rate_limit_at_once;

use bytes::Bytes;

use crate::{
    auth::Auth,
    model::QuotaState,
    proto::{
        Text, TextField, Texts,
        envoy::config::core::v3::{
            HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction,
        },
    },
    usage::{Reserved, Usage},
};

/// See [`super::fuzzing`].
#[cfg(fuzzing)]
pub(super) fn fuzz(data: &[u8]) {
    use crate::proto::envoy::service::{auth::v3::CheckRequest, ratelimit::v3::RateLimitRequest};
    use prost::Message as _;

    if let Some((read, hits)) = descriptor::Descriptor::read_alone(data) {
        let decoded = RateLimitRequest::decode(data).expect("the long way reads it");
        assert_eq!(hits, decoded.hits_addend);
        assert_eq!([read], [(&decoded.descriptors[0]).into()]);
    }
    if let Some(read) = request::Asked::read(data) {
        let decoded = CheckRequest::decode(data).expect("the long way reads it");
        let attributes = decoded.attributes.expect("it was read");
        let decoded = request::Asked::of(&attributes);
        for name in decoded.headers.names() {
            assert_eq!(read.headers.get(name), decoded.headers.get(name));
        }
        for (key, value) in decoded.extensions {
            let last = read.extensions.iter().rfind(|(of, _)| *of == key);
            assert_eq!(last, Some(&(key, value)));
        }
    }
}

/// Both services.
#[derive(Clone)]
pub(super) struct Handler {
    pub(super) auth: Auth,
    pub(super) usage: Usage,
    pub(super) afterwards: Afterwards,
}

/// What a user was granted.
#[derive(Default)]
struct Granted {
    /// How the total stands; `None`: nobody looked, or the tier's policy said so.
    quota: Option<QuotaState>,
    /// The handle of what is held.
    reservation: Option<String>,
}

impl From<Reserved> for Granted {
    fn from(reserved: Reserved) -> Self {
        Self {
            quota: reserved.quota,
            reservation: reserved.handle,
        }
    }
}

/// A name and what it says: of a header, or of metadata.
type Said = (&'static str, String);

fn header((name, value): Said) -> HeaderValue {
    HeaderValue {
        key: name.to_owned(),
        value,
        ..HeaderValue::default()
    }
}

/// A header in place of whatever is there, for every release: up to 1.36 the one flag is read, later
/// the other, whose zero value appends.
fn overwriting(said: Said) -> HeaderValueOption {
    #[expect(deprecated, reason = "older gateways read nothing else")]
    HeaderValueOption {
        header: Some(header(said)),
        append: Some(false),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
    }
}

/// Dynamic metadata. All of it is text: descriptors are made of nothing else, and numbers stay exact.
fn metadata(said: impl IntoIterator<Item = Said>) -> Texts {
    let field = |(name, value): Said| TextField {
        key: Bytes::from_static(name.as_bytes()),
        value: Some(Text {
            string_value: Some(value),
        }),
    };
    Texts {
        fields: said.into_iter().map(field).collect(),
    }
}
