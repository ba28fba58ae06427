//! How a request is refused: in the words of HTTP, and of gRPC where its client speaks that.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use tonic::Status;
use tonic_types::{StatusExt as _, pb};

use super::{
    Said,
    limits::{Limit, seconds},
    metadata, overwriting,
    request::Headers,
};
use crate::{
    error::{Error, Fault},
    grpc::{request_id::REQUEST_ID, status},
    proto::envoy::{
        service::auth::v3::{CheckResponse, DeniedHttpResponse, check_response::HttpResponse},
        r#type::v3::{HttpStatus, StatusCode},
    },
};

/// The one problem type of draft-ietf-httpapi-ratelimit-headers-10 that fits.
const QUOTA_EXCEEDED: &str = "https://iana.org/assignments/http-problem-types#quota-exceeded";

/// A refusal.
#[derive(Debug)]
pub(super) struct Denial {
    code: StatusCode,
    challenge: Option<String>,
    limit: Option<Limit>,
    status: Status,
}

impl Denial {
    /// The refusal of a request.
    ///
    /// # Errors
    /// What is no fault of the request: then the gateway's own policy decides.
    pub(super) fn of(error: Error, now: DateTime<Utc>) -> Result<Self, Status> {
        let code = match &error {
            Error::CredentialMissing | Error::Refused { .. } => StatusCode::Unauthorized,
            Error::AccountDisabled
            | Error::TierNotAllowed
            | Error::ApiKeyScopeMissing(_)
            // Not 429: clients try that again.
            | Error::RequestTooLarge { .. } => StatusCode::Forbidden,
            Error::QuotaExceeded(_)
            | Error::RateLimited { .. }
            | Error::TooManyReservations { .. } => StatusCode::TooManyRequests,
            _ => return Err(error.into()),
        };
        Ok(Self {
            code,
            challenge: challenge(&error),
            limit: Limit::exceeded(&error, now),
            status: error.into(),
        })
    }

    /// The refusal of what a descriptor asks for: gateways answer it with 429 whatever it is about.
    ///
    /// # Errors
    /// What is the fault of the service, or of a moment with too much to do.
    pub(super) fn of_descriptor(error: Error, now: DateTime<Utc>) -> Result<Self, Status> {
        match error {
            Error::Unavailable(_) | Error::Internal(_) | Error::Overloaded { .. } => {
                Err(error.into())
            }
            _ => Ok(Self {
                code: StatusCode::TooManyRequests,
                challenge: None,
                limit: Limit::exceeded(&error, now),
                status: error.into(),
            }),
        }
    }

    pub(super) fn reason(&self) -> String {
        let info = self.status.get_details_error_info();
        info.map(|info| info.reason).unwrap_or_default()
    }

    fn retry_after(&self) -> Option<Duration> {
        self.status.get_details_retry_info()?.retry_delay
    }

    /// What a client of HTTP is told beside the body.
    pub(super) fn headers(&self) -> Vec<Said> {
        let mut headers = Vec::new();
        if let Some(challenge) = &self.challenge {
            headers.push(("www-authenticate", challenge.clone()));
        }
        headers.extend(self.limit.iter().flat_map(Limit::headers));
        if let Some(time) = self.retry_after() {
            headers.push(("retry-after", seconds(time).to_string()));
        }
        headers
    }

    /// What [`Denial::problem`] is.
    pub(super) const CONTENT_TYPE: (&'static str, &'static str) =
        ("content-type", "application/problem+json");

    /// A problem (RFC 9457); `request_id` is that of the gateway.
    pub(super) fn problem(&self, request_id: Option<&str>) -> String {
        let (kind, title) = match self.code {
            StatusCode::Unauthorized => ("about:blank", "Unauthorized"),
            StatusCode::TooManyRequests if self.limit.is_some() => {
                (QUOTA_EXCEEDED, "Too Many Requests")
            }
            StatusCode::TooManyRequests => ("about:blank", "Too Many Requests"),
            _ => ("about:blank", "Forbidden"),
        };
        let mut problem = json!({
            "type": kind,
            "title": title,
            "status": i32::from(self.code),
            "detail": self.status.message(),
            "code": self.reason(),
        });
        if let Some(id) = request_id {
            problem["request_id"] = id.into();
        }
        if let Some(limit) = &self.limit {
            problem["violated-policies"] = json!([limit.policy]);
        }
        problem.to_string()
    }

    /// The answer to a gateway that asked whether a request may pass.
    pub(super) fn into_answer(self, sent: &Headers<'_>) -> CheckResponse {
        let request_id = sent.get(REQUEST_ID.as_str());
        let mut headers = self.headers();
        let body = if sent.is_grpc() {
            headers.extend(status_headers(&self.status, request_id));
            // Gateways make the message of it.
            self.status.message().to_owned()
        } else {
            let (name, value) = Self::CONTENT_TYPE;
            headers.push((name, value.to_owned()));
            self.problem(request_id)
        };
        CheckResponse {
            status: Some(pb::Status {
                code: self.status.code().into(),
                message: self.status.message().to_owned(),
                details: Vec::new(),
            }),
            dynamic_metadata: Some(metadata([("reason", self.reason())])),
            http_response: Some(HttpResponse::DeniedResponse(DeniedHttpResponse {
                status: Some(HttpStatus {
                    code: self.code.into(),
                }),
                headers: headers.into_iter().map(overwriting).collect(),
                body,
            })),
        }
    }
}

/// What a client of gRPC reads of a status, beside the message.
fn status_headers(error: &Status, request_id: Option<&str>) -> Vec<Said> {
    let error = match request_id {
        Some(id) => status::with_request_id(error, id),
        None => error.clone(),
    };
    let response = error.into_http::<tonic::body::Body>();
    let names = ["grpc-status", "grpc-status-details-bin"].into_iter();
    names
        .filter_map(|name| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some((name, value.to_owned()))
        })
        .collect()
}

/// What to come back with (RFC 6750 §3).
fn challenge(error: &Error) -> Option<String> {
    let parameters = match error {
        Error::CredentialMissing => String::new(),
        Error::Refused { fault, .. } => {
            let says = match fault {
                Fault::Expired => "the token has expired",
                Fault::SessionEnded => "the session has ended",
                Fault::AccountDisabled => "the account is disabled",
                Fault::Invalid | Fault::Reused => "the token is not valid",
            };
            format!(", error=\"invalid_token\", error_description=\"{says}\"")
        }
        // Scopes hold neither quotes nor backslashes.
        Error::ApiKeyScopeMissing(scope) => {
            format!(", error=\"insufficient_scope\", scope=\"{scope}\"")
        }
        _ => return None,
    };
    Some(format!("Bearer realm=\"tollkeeper\"{parameters}"))
}
