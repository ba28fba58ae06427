//! The door for the fuzzer: what must hold of whatever comes in as a call.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use prost::Message as _;

use super::{
    bearer::bearer, call::deadline, envoy, memory::token_of, quota, request_id, reservation,
};
use crate::proto::tollkeeper::{
    auth::v1::ValidateTokenRequest,
    usage::v1::{CheckQuotaRequest, ReserveQuotaRequest},
};

/// # Panics
/// When the short way reads a message otherwise than the long way, or a header is misread.
pub fn call(data: &[u8]) {
    message(data);
    read_in_place(data);
    // As a whole message, so that the fuzzer need not find out its length.
    if let Ok(len) = u32::try_from(data.len()) {
        message(&[&[0], &len.to_be_bytes()[..], data].concat());
    }
    let Ok(value) = HeaderValue::from_bytes(data) else {
        return;
    };
    let max = Duration::from_secs(30);
    let headers = HeaderMap::from_iter([
        (AUTHORIZATION, value.clone()),
        (http::HeaderName::from_static("grpc-timeout"), value.clone()),
        (request_id::REQUEST_ID, value),
    ]);
    if let Ok(credential) = bearer(&headers) {
        assert!(data.ends_with(credential.as_bytes()));
    }
    assert!(deadline(&headers, max) <= max);
    let id = request_id::of(&headers);
    assert!(id.to_str().is_ok() && (1..=128).contains(&id.len()));
}

fn read_in_place(data: &[u8]) {
    if let Some(asked) = reservation::Asked::read(data) {
        let decoded = ReserveQuotaRequest::decode(data).expect("the long way reads it");
        assert_eq!(asked, (&decoded).into());
    }
    if let Some(asked) = quota::Asked::read(data) {
        let decoded = CheckQuotaRequest::decode(data).expect("the long way reads it");
        assert_eq!(asked, (&decoded).into());
    }
    envoy::fuzz(data);
}

fn message(data: &[u8]) {
    if let Some(token) = token_of(data) {
        let decoded = ValidateTokenRequest::decode(&data[5..]).expect("the long way reads it");
        let plain = ValidateTokenRequest {
            token: token.to_owned(),
            ..ValidateTokenRequest::default()
        };
        assert_eq!(decoded, plain);
    }
}
