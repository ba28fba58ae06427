use chrono::Utc;
use tonic::{Request, Response, Status};

use super::{
    Handler, Said,
    denial::Denial,
    identity::Identity,
    limits::Limit,
    metadata, overwriting,
    request::Headers,
    route::{Quota, Route},
};
use crate::{
    auth::Validated,
    error::{Credential, Error, Result},
    grpc::{convert::only, request_id::REQUEST_ID},
    model::{MinFreshness, QuotaState, UserStanding},
    proto::envoy::service::auth::v3::{
        CheckRequest, CheckResponse, OkHttpResponse, authorization_server::Authorization,
        check_response::HttpResponse,
    },
    usage::{QuotaRequest, QuotaWish, Reserved, lease::Mode},
};

#[tonic::async_trait]
impl Authorization for Handler {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let attributes = request.get_ref().attributes.as_ref();
        let sent = Headers::of(attributes);
        let checked = match attributes {
            Some(attributes) => {
                let route = Route::read(&attributes.context_extensions, &self.usage.tiers())?;
                self.admit(&route, &sent).await
            }
            None => Err(Error::CredentialMissing),
        };
        Ok(Response::new(match checked {
            Ok(admitted) => admitted,
            Err(error) => Denial::of(error, Utc::now())?.into_answer(&sent),
        }))
    }
}

impl Handler {
    /// Lets a request pass that has a good credential and what its route asks for.
    async fn admit(&self, route: &Route, sent: &Headers<'_>) -> Result<CheckResponse> {
        let token = sent.credential()?;
        let now = Utc::now();
        let validated = self
            .auth
            .validate(token, Credential::Token, MinFreshness::Cached, now)
            .await?;
        route.admit_tier(&validated.user().tier)?;
        if let Some(key) = validated.api_key() {
            route.admit_scopes(&key.scopes)?;
        }
        let quota = match &route.quota {
            None => None,
            Some(quota) => self.quota(quota, route, &validated, sent).await?,
        };
        Ok(admitted(route, &Identity::from(&validated), quota, sent))
    }

    /// Looks at the user's quota, or holds some for the request.
    async fn quota(
        &self,
        quota: &Quota,
        route: &Route,
        validated: &Validated,
        sent: &Headers<'_>,
    ) -> Result<Option<Reserved>> {
        let user = validated.user();
        let user = UserStanding {
            id: user.id,
            tier: user.tier.clone(),
            is_active: user.is_active,
        };
        match quota {
            Quota::Look => {
                let wish = QuotaWish {
                    tokens: route.estimate.unwrap_or_default(),
                    model: route.model.clone(),
                };
                let quota = self.usage.require_quota(&user, &wish).await?;
                Ok(Some(Reserved {
                    handle: None,
                    tokens: 0,
                    expires_at: None,
                    quota,
                }))
            }
            Quota::Reserve {
                model,
                tokens,
                lifetime,
            } => {
                let id = sent.get(REQUEST_ID.as_str()).unwrap_or_default();
                let request = QuotaRequest {
                    // A gateway makes one; without it a repeat would hold twice.
                    request_id: only(|fields| fields.parse("x-request-id", id))?,
                    model: model.clone(),
                    tokens: *tokens,
                    mode: Mode::AllOrNothing,
                    lifetime: *lifetime,
                };
                self.usage.reserve(&user, &request).await.map(Some)
            }
        }
    }
}

/// The answer for a request that may pass.
fn admitted(
    route: &Route,
    identity: &Identity,
    reserved: Option<Reserved>,
    sent: &Headers<'_>,
) -> CheckResponse {
    let mut facts = identity.metadata();
    facts.extend(route.model.iter().map(|model| ("model", model.to_string())));
    let estimate = route.estimate.iter();
    facts.extend(estimate.map(|tokens| ("estimate", tokens.to_string())));
    let quota = reserved
        .as_ref()
        .and_then(|reserved| reserved.quota.as_ref());
    facts.extend(quota.into_iter().flat_map(quota_facts));
    let limit = quota.and_then(|quota| Limit::monthly(quota, false, Utc::now()));
    let handle = reserved.and_then(|reserved| reserved.handle);
    facts.extend(handle.map(|handle| ("reservation", handle)));
    let told = limit.iter().flat_map(Limit::headers);
    CheckResponse {
        status: Some(tonic_types::pb::Status::default()),
        dynamic_metadata: Some(metadata(facts)),
        http_response: Some(HttpResponse::OkResponse(OkHttpResponse {
            headers: identity.headers().into_iter().map(overwriting).collect(),
            headers_to_remove: identity.removed(sent, route.forwards_credential),
            response_headers_to_add: told.map(overwriting).collect(),
        })),
    }
}

/// How a quota stands, exactly. Of what is unlimited nothing is said.
pub(super) fn quota_facts(quota: &QuotaState) -> Vec<Said> {
    let number = |name, tokens: Option<i64>| Some((name, tokens?.to_string()));
    [
        Some(("month", quota.period.to_string())),
        number("limit_tokens", quota.limit),
        number("remaining_tokens", quota.remaining),
    ]
    .into_iter()
    .flatten()
    .collect()
}
