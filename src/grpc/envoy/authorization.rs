use chrono::{DateTime, Utc};
use tonic::{Request, Response, Status};

use super::{
    Granted, Handler,
    denial::Denial,
    identity::Identity,
    limits::{Limit, quota_facts},
    metadata, overwriting,
    request::{Asked, Headers},
    route::{Quota, Route},
};
use crate::{
    auth::{Auth, Validated},
    clock::BootTime,
    error::{Credential, Result},
    grpc::{convert::only, request_id::REQUEST_ID},
    model::{MinFreshness, UserStanding},
    proto::envoy::service::auth::v3::{
        CheckRequest, CheckResponse, OkHttpResponse, authorization_server::Authorization,
        check_response::HttpResponse,
    },
    usage::{QuotaRequest, QuotaWish, Usage, lease::Mode},
};

#[tonic::async_trait]
impl Authorization for Handler {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let attributes = request.get_ref().attributes.as_ref();
        let asked = attributes.map(Asked::of).unwrap_or_default();
        let route = Route::read(&asked.extensions, &self.usage.tiers())?;
        Ok(Response::new(
            match self.admit(&route, &asked.headers).await {
                Ok(admitted) => admitted,
                Err(error) => Denial::of(error, Utc::now())?.into_answer(&asked.headers),
            },
        ))
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
        let user = admit_user(route, &validated)?;
        let held = match wanted(route, sent)? {
            Wanted::Nothing => Granted::default(),
            Wanted::Look(wish) => Granted {
                quota: self.usage.require_quota(&user, &wish).await?,
                reservation: None,
            },
            Wanted::Hold(request) => self.usage.reserve(&user, request).await?.into(),
        };
        Ok(admitted(route, Identity::from(&validated), held, sent, now))
    }
}

/// What [`Authorization::check`] would answer a `CheckRequest`, if memory alone can say so and the request may pass.
pub(in crate::grpc) fn check_at_once(
    auth: &Auth,
    usage: &Usage,
    message: &[u8],
    now: DateTime<Utc>,
    clock: BootTime,
) -> Option<CheckResponse> {
    let asked = Asked::read(message)?;
    let route = Route::read(&asked.extensions, &usage.tiers()).ok()?;
    let sent = asked.headers;
    let validated = auth.recall(sent.credential().ok()?, now, clock)?;
    let user = admit_user(&route, &validated).ok()?;
    let held = match wanted(&route, &sent).ok()? {
        Wanted::Nothing => Granted::default(),
        Wanted::Look(wish) => Granted {
            // Another decision is left to the long way.
            quota: usage.check_quota_at_once(&user, &wish, clock.into())?.1,
            reservation: None,
        },
        Wanted::Hold(request) => usage.reserve_at_once(&user, request, clock.into())?.into(),
    };
    let identity = Identity::from(&validated);
    Some(admitted(&route, identity, held, &sent, now))
}

/// Holds a user to what the route asks of them.
fn admit_user(route: &Route, validated: &Validated) -> Result<UserStanding> {
    let user = validated.user();
    route.admit_tier(&user.tier)?;
    if let Some(key) = validated.api_key() {
        route.admit_scopes(&key.scopes)?;
    }
    Ok(UserStanding {
        id: user.id,
        tier: user.tier.clone(),
        is_active: user.is_active,
    })
}

/// What a request wants of its user's quota.
enum Wanted {
    Nothing,
    Look(QuotaWish),
    Hold(QuotaRequest),
}

fn wanted(route: &Route, sent: &Headers<'_>) -> Result<Wanted> {
    Ok(match &route.quota {
        None => Wanted::Nothing,
        Some(Quota::Look) => Wanted::Look(QuotaWish {
            tokens: route.estimate.unwrap_or_default(),
            model: route.model.clone(),
        }),
        Some(Quota::Reserve {
            model,
            tokens,
            lifetime,
        }) => {
            let id = sent.get(REQUEST_ID.as_str()).unwrap_or_default();
            Wanted::Hold(QuotaRequest {
                // A gateway makes one; without it a repeat would hold twice.
                request_id: only(|fields| fields.parse("x-request-id", id))?,
                model: model.clone(),
                tokens: *tokens,
                mode: Mode::AllOrNothing,
                lifetime: *lifetime,
            })
        }
    })
}

/// The answer for a request that may pass.
fn admitted(
    route: &Route,
    identity: Identity,
    held: Granted,
    sent: &Headers<'_>,
    now: DateTime<Utc>,
) -> CheckResponse {
    let quota = held.quota.as_ref();
    let limit = quota.and_then(|quota| Limit::monthly(quota, false, now));
    let told = limit.iter().flat_map(Limit::headers);
    let http_response = HttpResponse::OkResponse(OkHttpResponse {
        headers: identity.headers().map(overwriting).collect(),
        headers_to_remove: identity.removed(sent, route.forwards_credential),
        response_headers_to_add: told.map(overwriting).collect(),
    });
    let model = route.model.iter().map(|model| ("model", model.to_string()));
    let estimate = route.estimate.iter();
    let estimate = estimate.map(|tokens| ("estimate", tokens.to_string()));
    let handle = held.reservation.map(|handle| ("reservation", handle));
    let facts = identity.into_metadata().chain(model).chain(estimate);
    let facts = facts.chain(quota.into_iter().flat_map(quota_facts));
    CheckResponse {
        status: Some(tonic_types::pb::Status::default()),
        dynamic_metadata: Some(metadata(facts.chain(handle))),
        http_response: Some(http_response),
    }
}
