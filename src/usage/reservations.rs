//! Quota held for requests whose cost is known only afterwards.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::{
    Usage,
    handle::Handle,
    keeper::{Holding, Reservation, Standing, Wish},
    lease::{Boot, Ended, Mode, Refusal},
    ledger::{Recorded, check_occurred_at},
    quota::stands,
    spool::Unsettled,
    writer::WhenFull,
};
use crate::{
    error::{Error, Result},
    model::{
        Booking, BookingOrigin, EventId, HoldName, Labels, MeterName, ModelName, OnOutage, Period,
        QuotaExceeded, QuotaState, RequestId, TierLimits, TokenCounts, Tokens, UsageEvent, UserId,
        UserStanding,
    },
};

/// When to come back to a server, or a user, that holds as many reservations as it may.
const TOO_MANY_RETRY: Duration = Duration::from_secs(1);

/// What a request is expected to use.
#[derive(Clone, Debug)]
pub struct QuotaRequest {
    pub request_id: RequestId,
    pub model: ModelName,
    /// 1 to 10^12.
    pub tokens: Tokens,
    pub mode: Mode,
    pub lifetime: Duration,
}

/// Quota that is held.
#[derive(Clone, Debug)]
pub struct Reserved {
    /// The signed handle; `None`: it was only a look.
    pub handle: Option<String>,
    pub tokens: Tokens,
    pub expires_at: Option<DateTime<Utc>>,
    /// `None`: admitted by the tier's policy, while the database is away.
    pub quota: Option<QuotaState>,
}

/// What became of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    Booked(Recorded),
    /// To be booked when the database is back.
    Accepted,
}

impl Usage {
    /// Holds tokens for a request of a user, see [`super::Keeper::reserve`].
    ///
    /// # Errors
    /// `AccountDisabled` · `RequestTooLarge` · `RateLimited` · `QuotaExceeded` ·
    /// `TooManyReservations` · `Unavailable`
    pub async fn reserve(&self, user: &UserStanding, request: QuotaRequest) -> Result<Reserved> {
        let reserved = self.try_reserve(user, request).await;
        self.counters.count_reserved(&reserved);
        reserved
    }

    async fn try_reserve(&self, user: &UserStanding, request: QuotaRequest) -> Result<Reserved> {
        let tiers = self.tiers();
        let limits = tiers.limits_of(&user.tier);
        let wish = self.wish(user, limits, &request)?;
        let reservation = self.keeper.reserve(&wish).await;
        self.reserved(user, limits, request, reservation)
    }

    /// [`Usage::reserve`], if memory says yes; `None`: it may say so yet. `now` was lately.
    pub fn reserve_at_once(
        &self,
        user: &UserStanding,
        request: QuotaRequest,
        now: Boot,
    ) -> Option<Reserved> {
        let tiers = self.tiers.load();
        let limits = tiers.limits_of(&user.tier);
        let wish = self.wish(user, limits, &request).ok()?;
        let reservation = self.keeper.reserve_at_once(&wish, now)?;
        let reserved = self.reserved(user, limits, request, reservation);
        // What is refused here is asked, and counted, again.
        if reserved.is_ok() {
            self.counters.count_reserved(&reserved);
        }
        reserved.ok()
    }

    fn wish<'a>(
        &self,
        user: &UserStanding,
        limits: &'a TierLimits,
        request: &'a QuotaRequest,
    ) -> Result<Wish<'a>> {
        may_ask(user, limits, request.tokens)?;
        Ok(Wish {
            user_id: user.id,
            limits,
            model: Some(&request.model),
            request: self
                .request_keys
                .key(user.id, &request.request_id, &request.model),
            tokens: request.tokens,
            mode: request.mode,
            lasts: request.lifetime,
            is_request: request.mode != Mode::LookOnly,
        })
    }

    fn reserved(
        &self,
        user: &UserStanding,
        limits: &TierLimits,
        request: QuotaRequest,
        reservation: Reservation,
    ) -> Result<Reserved> {
        match reservation {
            Reservation::Held(holding) => {
                let Holding {
                    owner,
                    held,
                    created_at,
                    expires_at,
                    total,
                } = holding;
                let handle = Handle {
                    hold: HoldName {
                        owner,
                        hold: held.id,
                    },
                    user_id: user.id,
                    model: request.model,
                    request_id: request.request_id,
                    tokens: held.tokens,
                    created_at,
                    expires_at,
                    may_wait: limits.on_outage != OnOutage::Closed,
                };
                let period = Period::containing(created_at);
                Ok(Reserved {
                    handle: Some(handle.sign(&self.handle_key)),
                    tokens: held.tokens,
                    expires_at: Some(expires_at),
                    quota: total.map(|standing| standing.state(period, &user.tier)),
                })
            }
            Reservation::Enough(total) => Ok(Reserved {
                handle: None,
                tokens: 0,
                expires_at: None,
                quota: stands(user, total),
            }),
            refused => Err(denial(user, limits, refused)),
        }
    }
}

impl Usage {
    /// Reads a handle.
    ///
    /// # Errors
    /// `ReservationInvalid`
    fn handle(&self, text: &str) -> Result<Handle> {
        Handle::read(text, &self.handle_key).ok_or(Error::ReservationInvalid)
    }

    /// Holds the tokens of a reservation for `lifetime` from now on; answers its new handle and when
    /// it expires. Another replica than the owner holds them anew. `user` looks its user up.
    ///
    /// # Errors
    /// `ReservationInvalid` · `ReservationEnded` · those of `user` and of [`Usage::reserve`]
    pub async fn extend(
        &self,
        text: &str,
        user: impl AsyncFnOnce(UserId) -> Result<UserStanding>,
        lifetime: Duration,
    ) -> Result<(String, DateTime<Utc>)> {
        let handle = self.handle(text)?;
        // Whoever is disabled meanwhile gets no further, here as elsewhere.
        let user = user(handle.user_id).await?;
        if !user.is_active {
            return Err(Error::AccountDisabled);
        }
        if self.keeper.is_owner(handle.hold.owner) {
            let expires_at = self.keeper.extend(handle.hold, lifetime).await?;
            let handle = Handle {
                expires_at,
                ..handle
            };
            return Ok((handle.sign(&self.handle_key), expires_at));
        }
        self.take_over(handle, &user, lifetime).await
    }

    /// Holds here what another replica holds, and has that one released.
    async fn take_over(
        &self,
        handle: Handle,
        user: &UserStanding,
        lifetime: Duration,
    ) -> Result<(String, DateTime<Utc>)> {
        if handle.expires_at <= self.keeper.now().ok_or_else(silence)? {
            return Err(Error::ReservationEnded);
        }
        let period = Period::containing(handle.created_at);
        let is_booked = self
            .store
            .is_booked(period, handle.user_id, handle.event_id());
        if is_booked.await? {
            return Err(Error::ReservationEnded);
        }
        let tiers = self.tiers();
        let limits = tiers.limits_of(&user.tier);
        let wish = Wish {
            user_id: user.id,
            limits,
            model: Some(&handle.model),
            request: self
                .request_keys
                .key(user.id, &handle.request_id, &handle.model),
            tokens: handle.tokens,
            mode: Mode::AllOrNothing,
            lasts: lifetime,
            is_request: false,
        };
        let holding = match self.keeper.reserve(&wish).await {
            Reservation::Held(holding) => holding,
            refused => return Err(denial(user, limits, refused)),
        };
        let anew = HoldName {
            owner: holding.owner,
            hold: holding.held.id,
        };
        let mut expires_at = holding.expires_at;
        if holding.held.replay {
            // The request was reserved here, too, for as long as that said.
            expires_at = self.keeper.extend(anew, lifetime).await?;
        }
        let released = self.release_elsewhere(&handle).await;
        // One that the request has here all the same stays, unless the request is over.
        let is_over = matches!(released, Err(Error::ReservationEnded));
        if is_over || (released.is_err() && !holding.held.replay) {
            self.keeper.release(anew);
        }
        released?;
        let handle = Handle {
            hold: anew,
            expires_at,
            ..handle
        };
        Ok((handle.sign(&self.handle_key), handle.expires_at))
    }

    /// Gives the tokens of a reservation back. What was released or has expired stays so.
    ///
    /// # Errors
    /// `ReservationInvalid` · `ReservationEnded` when it was committed · `Unavailable`
    pub async fn release(&self, text: &str) -> Result<()> {
        let handle = self.handle(text)?;
        match self.keeper.release(handle.hold) {
            Ended::Now => Ok(()),
            // A commit is under way: it may still fail, and then the reservation expires.
            Ended::Later => Err(Error::ReservationEnded),
            Ended::Unknown => self.release_elsewhere(&handle).await,
        }
    }

    async fn release_elsewhere(&self, handle: &Handle) -> Result<()> {
        let period = Period::containing(handle.created_at);
        let released =
            self.store
                .hold_release(handle.hold, period, handle.user_id, handle.event_id());
        if released.await? {
            Ok(())
        } else {
            Err(Error::ReservationEnded)
        }
    }

    /// Books what a request really used, and ends its reservation, which may be another replica's.
    ///
    /// Durable when it is [`Committed::Booked`]. A dropped future leaves the commit behind, which is
    /// booked or not; repeated, it counts once.
    ///
    /// # Errors
    /// `ReservationInvalid` · `Invalid` when it is too old · those of [`Usage::record`]
    pub async fn commit(
        &self,
        text: &str,
        tokens: TokenCounts,
        labels: Labels,
        when_full: WhenFull,
    ) -> Result<(Committed, EventId)> {
        let handle = self.handle(text)?;
        self.commit_handle(handle, tokens, labels, when_full).await
    }

    /// [`Usage::commit`] of a handle that is read.
    pub(super) async fn commit_handle(
        &self,
        handle: Handle,
        tokens: TokenCounts,
        labels: Labels,
        when_full: WhenFull,
    ) -> Result<(Committed, EventId)> {
        if let Err(violation) = check_occurred_at(handle.created_at, self.now()) {
            return Err(Error::invalid("reservation", violation));
        }
        let event_id = handle.event_id();
        let is_own = self.keeper.is_owner(handle.hold.owner);
        let is_late = self.keeper.now().is_some_and(|now| handle.expires_at < now);
        let booking = Booking {
            origin: BookingOrigin::Commit {
                settles: (!is_own).then_some(handle.hold),
            },
            event: UsageEvent {
                event_id,
                occurred_at: handle.created_at,
                user_id: handle.user_id,
                model: handle.model,
                tokens,
                request_id: handle.request_id.into_string(),
                labels,
            },
        };
        let unsettled = Unsettled::begin(&self.spool, &self.keeper, booking.clone(), handle.hold);
        let outcome = if handle.may_wait && self.keeper.is_fenced() {
            unsettled.accept()?
        } else {
            match self.book(booking, when_full).await {
                Err(Error::Unavailable(_)) if handle.may_wait => unsettled.accept()?,
                booked => Committed::Booked(unsettled.settle(booked)?),
            }
        };
        self.counters.count_committed(outcome, is_late);
        Ok((outcome, event_id))
    }
}

/// What is refused whatever is left.
///
/// # Errors
/// `AccountDisabled` · `RequestTooLarge`
pub(super) fn may_ask(user: &UserStanding, limits: &TierLimits, tokens: Tokens) -> Result<()> {
    if !user.is_active {
        return Err(Error::AccountDisabled);
    }
    match limits.exceeded_by(tokens) {
        Some(limit) => Err(Error::RequestTooLarge { limit }),
        None => Ok(()),
    }
}

/// Why nothing is held.
pub(super) fn denial(user: &UserStanding, limits: &TierLimits, refused: Reservation) -> Error {
    match refused {
        Reservation::Denied(meters) => exceeded(user, meters),
        Reservation::RateLimited(retry_after) => Error::RateLimited {
            limit: limits.requests_per_minute.unwrap_or_default(),
            retry_after,
        },
        Reservation::Refused(Refusal::TooManyHolds | Refusal::Full) => Error::TooManyReservations {
            retry_after: TOO_MANY_RETRY,
        },
        Reservation::Refused(Refusal::Fenced | Refusal::BeyondHorizon | Refusal::Allowance)
        | Reservation::Held(_)
        | Reservation::Enough(_) => silence(),
    }
}

/// Of several meters that are short, the total is named.
fn exceeded(user: &UserStanding, meters: Vec<(MeterName, Standing)>) -> Error {
    let short = meters
        .into_iter()
        .min_by_key(|(meter, _)| meter.model.is_some());
    let Some((meter, standing)) = short else {
        // A lease that is gone again: its replica was taken for dead meanwhile.
        return silence();
    };
    Error::QuotaExceeded(Box::new(QuotaExceeded {
        user_id: user.id,
        model: meter.model,
        quota: standing.state(meter.period, &user.tier),
    }))
}

fn silence() -> Error {
    Error::Unavailable("quota cannot be held now".into())
}
