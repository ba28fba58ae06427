//! Gateways that speak the protocols of the Envoy API.

mod at_once;
mod callers;
mod certificates;
mod charges;
mod check;
mod edge;
mod limits;
mod rest;
pub(crate) mod upstream;

use std::collections::HashMap;

use prost::Message as _;
use tollkeeper::proto::{
    Texts,
    envoy::{
        config::core::v3::HeaderValueOption,
        service::auth::v3::{
            AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
            attribute_context::{HttpRequest, Request},
            authorization_client::AuthorizationClient,
            check_response::HttpResponse,
        },
    },
};
use tonic::Status;

use crate::harness::{TestApp, with_bearer};

type Pairs<'a> = &'a [(&'a str, &'a str)];

/// Asks, as a gateway with a key, whether a request with these headers may pass a route.
async fn check(
    app: &TestApp,
    headers: Pairs<'_>,
    extensions: Pairs<'_>,
) -> Result<CheckResponse, Status> {
    let (_, key) = app.service(&unique("gateway"), &["gateway"]).await;
    let request = with_bearer(asking(headers, extensions), &key);
    let mut client = AuthorizationClient::new(app.channel.clone());
    Ok(client.check(request).await?.into_inner())
}

fn asking(headers: Pairs<'_>, extensions: Pairs<'_>) -> CheckRequest {
    let http = HttpRequest {
        headers: map(headers),
        ..HttpRequest::default()
    };
    CheckRequest {
        attributes: Some(AttributeContext {
            request: Some(Request { http: Some(http) }),
            context_extensions: map(extensions),
        }),
    }
}

fn map(pairs: Pairs<'_>) -> HashMap<String, String> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

fn unique(name: &str) -> String {
    format!("{name}-{}", uuid::Uuid::now_v7().simple())
}

/// What lets a request pass.
#[track_caller]
fn passed(answer: CheckResponse) -> OkHttpResponse {
    assert_eq!(answer.status.as_ref().expect("a status").code, 0);
    match answer.http_response {
        Some(HttpResponse::OkResponse(ok)) => ok,
        other => panic!("did not pass: {other:?}"),
    }
}

/// What refuses a request, and the HTTP status.
#[track_caller]
fn refused(answer: CheckResponse) -> (i32, DeniedHttpResponse) {
    assert_ne!(answer.status.as_ref().expect("a status").code, 0);
    match answer.http_response {
        Some(HttpResponse::DeniedResponse(denied)) => {
            (denied.status.expect("a status").code, denied)
        }
        other => panic!("was not refused: {other:?}"),
    }
}

/// Headers by name. Each replaces what is there, whichever flag a release reads.
#[track_caller]
fn overwriting(options: &[HeaderValueOption]) -> HashMap<String, String> {
    let headers = options.iter().map(|option| {
        #[expect(deprecated, reason = "older releases read nothing else")]
        let flags = (option.append, option.append_action);
        assert_eq!(flags, (Some(false), 2));
        let header = option.header.clone().expect("a header");
        (header.key, header.value)
    });
    let headers: HashMap<_, _> = headers.collect();
    assert_eq!(headers.len(), options.len(), "said twice");
    headers
}

/// Dynamic metadata by key, as gateways read it.
fn metadata(of: Option<Texts>) -> HashMap<String, String> {
    let bytes = of.expect("metadata").encode_to_vec();
    let of = prost_types::Struct::decode(bytes.as_slice()).expect("the same bytes");
    let fields = of.fields.into_iter();
    let text = |value: prost_types::Value| match value.kind {
        Some(prost_types::value::Kind::StringValue(text)) => text,
        other => panic!("no text: {other:?}"),
    };
    fields.map(|(key, value)| (key, text(value))).collect()
}
