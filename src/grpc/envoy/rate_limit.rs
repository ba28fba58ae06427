use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;
use tracing::warn;

use super::{
    Granted, Handler,
    afterwards::Begun,
    denial::Denial,
    descriptor::{self, Ask, Descriptor, Hold, Of},
    header,
    limits::{Limit, Unit, quota_facts},
    metadata,
    work::Work,
};
use crate::{
    auth::Auth,
    clock::BootTime,
    error::{Error, Result},
    model::{Labels, QuotaState, TokenCounts, UserStanding},
    proto::envoy::service::ratelimit::v3::{
        RateLimitRequest, RateLimitResponse,
        rate_limit_response::{Code, DescriptorStatus, RateLimit, rate_limit},
        rate_limit_service_server::RateLimitService,
    },
    usage::{QuotaWish, Usage, WhenFull},
};

/// How long what a request used waits to be booked. Holds last at least about as long.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many wait so at most: their gateways are gone, so nothing else bounds the memory that they take.
const MOST_PATIENT: usize = 10_000;

/// Of a call: more than any route has.
const MAX_DESCRIPTORS: usize = 64;

#[tonic::async_trait]
impl RateLimitService for Handler {
    async fn should_rate_limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let message = request.get_ref();
        let descriptors = message.descriptors.len();
        if descriptors == 0 {
            return Err(Error::invalid("descriptors", "must hold one at least").into());
        }
        if descriptors > MAX_DESCRIPTORS {
            let most = format!("must be {MAX_DESCRIPTORS} at most");
            return Err(Error::invalid("descriptors", most).into());
        }
        let work = Work::of(&message.descriptors, message.hits_addend);
        let settles = work.settles();
        let handler = self.clone();
        // A gateway does not wait for what it says at the end of a stream, and never repeats it.
        let answer = if settles {
            let begun = self.afterwards.begin();
            let answer = async move {
                let when_full = patience(&begun);
                handler.carry_out(work, descriptors, when_full).await
            };
            tokio::spawn(answer.in_current_span())
                .await
                .map_err(Error::internal)?
        } else {
            handler.carry_out(work, descriptors, WhenFull::Refuse).await
        };
        Ok(Response::new(answer?))
    }
}

/// What [`RateLimitService::should_rate_limit`] would answer a `RateLimitRequest`, if memory alone can
/// say so and it is good news about one descriptor.
pub(in crate::grpc) fn should_rate_limit_at_once(
    auth: &Auth,
    usage: &Usage,
    message: &[u8],
    now: DateTime<Utc>,
    clock: BootTime,
) -> Option<RateLimitResponse> {
    let (descriptor, hits) = Descriptor::read_alone(message)?;
    let granted = match descriptor::read(&descriptor, hits).ok()? {
        Ask::Check(user, wish) => {
            let user = auth.recall_user(user, clock)?;
            Granted {
                // Another decision is left to the long way.
                quota: usage.check_quota_at_once(&user, &wish, clock.into())?.1,
                reservation: None,
            }
        }
        Ask::Reserve(user, wish) => {
            let user = auth.recall_user(user, clock)?;
            usage.reserve_at_once(&user, wish, clock.into())?.into()
        }
        Ask::Book(..) | Ask::Settle(..) | Ask::Release(_) => return None,
    };
    let mut answer = Answer::new(1, now);
    answer.grant(&[0], granted);
    answer.finish().ok()
}

/// What work that goes on without its caller does while too much is to be booked.
fn patience(begun: &Begun) -> WhenFull {
    if begun.with_others() > MOST_PATIENT {
        WhenFull::Refuse
    } else {
        WhenFull::WaitUntil(Instant::now() + PATIENCE)
    }
}

impl Handler {
    /// Does all that is asked for, also when some of it fails: what was used was used.
    async fn carry_out(
        &self,
        work: Work,
        descriptors: usize,
        when_full: WhenFull,
    ) -> Result<RateLimitResponse, Status> {
        let mut answer = Answer::new(descriptors, Utc::now());
        for (place, error) in work.wrong {
            answer.refuse(&[place], error);
        }
        for (places, ask) in work.asks {
            let books = matches!(ask, Ask::Book(..));
            match self.carry_out_one(ask, when_full).await {
                Ok(granted) => answer.grant(&places, granted),
                Err(error) => {
                    if books {
                        // No gateway says it again, or heeds what it is told at the end of a stream.
                        warn!(
                            error = error.with_causes(),
                            "what a request used is not booked"
                        );
                    }
                    answer.refuse(&places, error);
                }
            }
        }
        // The request does not pass: nothing is held for it.
        if answer.denial.is_some() || answer.failure.is_some() {
            for reservation in answer.reservations.drain(..) {
                if let Err(error) = self.usage.release(&reservation).await {
                    tracing::debug!(%error, "a reservation that is not needed expires");
                }
            }
        }
        answer.finish()
    }

    async fn carry_out_one(&self, ask: Ask, when_full: WhenFull) -> Result<Granted> {
        match ask {
            Ask::Check(user, wish) => {
                let user = self.auth.user_standing(user).await?;
                self.look(&user, &wish).await
            }
            Ask::Reserve(user, request) => {
                let user = self.auth.user_standing(user).await?;
                let reserved = self.usage.reserve(&user, request).await?;
                Ok(reserved.into())
            }
            Ask::Book(of, tokens) | Ask::Settle(of, tokens) if tokens.total() > 0 => {
                self.book(&of, tokens, when_full).await
            }
            // Nothing was used.
            Ask::Book(of, _) if of.hold == Hold::None => {
                let user = self.auth.user_standing(of.user).await?;
                let wish = QuotaWish {
                    tokens: 0,
                    model: Some(of.request.model),
                };
                self.look(&user, &wish).await
            }
            Ask::Book(of, _) | Ask::Settle(of, _) | Ask::Release(of) => self.release(of).await,
        }
    }

    async fn look(&self, user: &UserStanding, wish: &QuotaWish) -> Result<Granted> {
        let quota = self.usage.require_quota(user, wish).await?;
        Ok(Granted {
            quota,
            reservation: None,
        })
    }

    async fn book(&self, of: &Of, tokens: TokenCounts, when_full: WhenFull) -> Result<Granted> {
        let user = async || self.auth.user_standing(of.user).await;
        match &of.hold {
            Hold::Named(handle) => {
                self.usage
                    .commit(handle, tokens, Labels::default(), when_full)
                    .await?;
            }
            Hold::OfRequest => {
                let user = user().await?;
                self.usage
                    .commit_request(&user, &of.request, tokens, when_full)
                    .await?;
            }
            Hold::None => {
                self.usage
                    .charge(&user().await?, &of.request, tokens, when_full)
                    .await?;
            }
        }
        Ok(Granted::default())
    }

    async fn release(&self, of: Of) -> Result<Granted> {
        match &of.hold {
            Hold::Named(handle) => match self.usage.release(handle).await {
                // Committed, perhaps just now: there is nothing to hold any more.
                Ok(()) | Err(Error::ReservationEnded) => {}
                Err(error) => return Err(error),
            },
            Hold::OfRequest | Hold::None => {
                let user = self.auth.user_standing(of.user).await?;
                self.usage.release_request(&user, &of.request);
            }
        }
        Ok(Granted::default())
    }
}

/// An answer in the making.
struct Answer {
    now: DateTime<Utc>,
    statuses: Vec<DescriptorStatus>,
    /// The first that was looked at, and the limit that it has.
    quota: Option<(QuotaState, Option<Limit>)>,
    reservations: Vec<String>,
    /// The first of each.
    denial: Option<Denial>,
    failure: Option<Status>,
}

impl Answer {
    fn new(descriptors: usize, now: DateTime<Utc>) -> Self {
        Self {
            now,
            statuses: vec![DescriptorStatus::default(); descriptors],
            quota: None,
            reservations: Vec::new(),
            denial: None,
            failure: None,
        }
    }

    fn grant(&mut self, places: &[usize], granted: Granted) {
        let quota = granted.quota.map(|quota| {
            let limit = Limit::monthly(&quota, false, self.now);
            (quota, limit)
        });
        let limit = quota.as_ref().and_then(|(_, limit)| limit.as_ref());
        self.set(places, Code::Ok, limit);
        self.quota = self.quota.take().or(quota);
        self.reservations.extend(granted.reservation);
    }

    fn refuse(&mut self, places: &[usize], error: Error) {
        let limit = Limit::exceeded(&error, self.now);
        self.set(places, Code::OverLimit, limit.as_ref());
        match Denial::of_descriptor(error, self.now) {
            Ok(denial) => drop(self.denial.get_or_insert(denial)),
            Err(failure) => drop(self.failure.get_or_insert(failure)),
        }
    }

    fn set(&mut self, places: &[usize], code: Code, limit: Option<&Limit>) {
        for place in places {
            self.statuses[*place] = status(code, limit);
        }
    }

    /// # Errors
    /// When the service could not do all that it was asked for.
    fn finish(self) -> Result<RateLimitResponse, Status> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let (quota, limit) = self.quota.unzip();
        let mut facts: Vec<_> = quota.iter().flat_map(quota_facts).collect();
        let limit = limit.flatten();
        let mut told: Vec<_> = limit.iter().flat_map(Limit::headers).collect();
        let (mut code, mut body) = (Code::Ok, String::new());
        if let Some(denial) = self.denial {
            code = Code::OverLimit;
            body = denial.problem(None);
            told = denial.headers();
            let (name, value) = Denial::CONTENT_TYPE;
            told.push((name, value.to_owned()));
            facts.push(("reason", denial.reason()));
        }
        let reservation = self.reservations.into_iter().next();
        facts.extend(reservation.map(|handle| ("reservation", handle)));
        Ok(RateLimitResponse {
            overall_code: code.into(),
            statuses: self.statuses,
            response_headers_to_add: told.into_iter().map(header).collect(),
            raw_body: body.into_bytes(),
            dynamic_metadata: Some(metadata(facts)),
        })
    }
}

/// How a descriptor fares. Numbers saturate: gateways have 32 bits for them.
fn status(code: Code, limit: Option<&Limit>) -> DescriptorStatus {
    let saturated = |number: i64| u32::try_from(number.max(0)).unwrap_or(u32::MAX);
    let current_limit = limit.map(|limit| RateLimit {
        requests_per_unit: saturated(limit.quota),
        unit: match limit.unit {
            Unit::Tokens => rate_limit::Unit::Month,
            Unit::Requests => rate_limit::Unit::Minute,
        }
        .into(),
        name: limit.policy.to_owned(),
    });
    let unlimited = if code == Code::Ok { u32::MAX } else { 0 };
    DescriptorStatus {
        code: code.into(),
        current_limit,
        limit_remaining: limit.map_or(unlimited, |limit| saturated(limit.remaining)),
        duration_until_reset: limit.and_then(|limit| until(limit.resets_in)),
    }
}

fn until(time: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(time).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_32_bits_saturate() {
        let limit = |quota, remaining| Limit {
            policy: "monthly-tokens",
            unit: Unit::Tokens,
            quota,
            remaining,
            window: Duration::from_hours(720),
            resets_in: Duration::from_secs(5),
        };
        let told = status(Code::Ok, Some(&limit(1_000_000_000_000, 4_294_967_296)));
        let of = told.current_limit.expect("a limit");
        assert_eq!(of.requests_per_unit, u32::MAX);
        assert_eq!(told.limit_remaining, u32::MAX);
        let told = status(Code::OverLimit, Some(&limit(100, -1)));
        assert_eq!(told.limit_remaining, 0);
    }

    #[test]
    fn one_refusal_refuses_all_and_each_has_its_own_status() {
        let mut answer = Answer::new(3, Utc::now());
        answer.grant(&[0, 2], Granted::default());
        answer.refuse(&[1], Error::UserNotFound);
        let answer = answer.finish().expect("an answer");
        assert_eq!(answer.overall_code(), Code::OverLimit);
        let codes: Vec<_> = answer.statuses.iter().map(DescriptorStatus::code).collect();
        assert_eq!(codes, [Code::Ok, Code::OverLimit, Code::Ok]);
    }

    #[test]
    fn what_could_not_be_done_is_a_failure_and_no_verdict() {
        let mut answer = Answer::new(2, Utc::now());
        answer.refuse(&[0], Error::UserNotFound);
        answer.refuse(&[1], Error::Unavailable("away".into()));
        let failure = answer.finish().expect_err("a failure");
        assert_eq!(failure.code(), tonic::Code::Unavailable);
    }
}
