//! What requests used, by the names of user and request: for gateways that keep no handle.

use std::time::Duration;

use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};
use tokio::time::{Instant, sleep};

use super::{
    Usage,
    handle::{Handle, event_id},
    lease::Ended,
    ledger::Recorded,
    reservations::Committed,
    writer::WhenFull,
};
use crate::{
    error::{Error, Result},
    model::{
        Booking, BookingOrigin, EventId, Labels, ModelName, OnOutage, Period, RequestId,
        TokenCounts, UsageEvent, UserId, UserStanding,
    },
};

/// How long after the turn of a month a request may be told of again that was booked before it.
const TURN: TimeDelta = TimeDelta::hours(1);

/// When to look again what was booked before it, for callers that wait.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A request of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestName {
    pub request_id: RequestId,
    pub model: ModelName,
}

impl Usage {
    /// Books what a request used that nothing was held for. The same event as its commit would be: it
    /// counts once, however often and whichever way it is told, within a month and the first hour of the
    /// next.
    ///
    /// The caller has checked that the user exists. Durable when it returns; a dropped future leaves it
    /// behind to be booked.
    ///
    /// # Errors
    /// Those of [`Usage::record`]
    pub async fn charge(
        &self,
        user: &UserStanding,
        request: &RequestName,
        tokens: TokenCounts,
        when_full: WhenFull,
    ) -> Result<Recorded> {
        // As exactly as the database keeps it.
        let now = self.now().trunc_subsecs(6);
        self.charge_at(user, request, tokens, when_full, now).await
    }

    /// [`Usage::charge`] at a time.
    ///
    /// # Errors
    /// Those of [`Usage::charge`]
    pub async fn charge_at(
        &self,
        user: &UserStanding,
        request: &RequestName,
        tokens: TokenCounts,
        when_full: WhenFull,
        now: DateTime<Utc>,
    ) -> Result<Recorded> {
        let event_id = event_id(user.id, &request.request_id);
        let last_month = before(Period::containing(now));
        let is_turn = now - Period::containing(now).start() < TURN;
        let was_told = is_turn && {
            let period = Period::containing(last_month);
            self.was_booked(period, user.id, event_id, when_full)
                .await?
        };
        let event = UsageEvent {
            event_id,
            // Told again it is the event of that month, or a conflict with it.
            occurred_at: if was_told { last_month } else { now },
            user_id: user.id,
            model: request.model.clone(),
            tokens,
            request_id: request.request_id.as_str().to_owned(),
            labels: Labels::default(),
        };
        let charges = self.keeper.charges_of(std::slice::from_ref(&event));
        // Told again, it has another time.
        let origin = BookingOrigin::Commit { settles: None };
        let recorded = self.book(Booking { event, origin }, when_full).await?;
        if recorded == Recorded::Now {
            charges.iter().for_each(|charge| self.keeper.charge(charge));
        }
        Ok(recorded)
    }

    /// Whether an event is booked in a month. Callers that wait for room wait for this as well.
    async fn was_booked(
        &self,
        period: Period,
        user_id: UserId,
        event_id: EventId,
        when_full: WhenFull,
    ) -> Result<bool> {
        loop {
            match (
                self.store.is_booked(period, user_id, event_id).await,
                when_full,
            ) {
                (Err(Error::Unavailable(_)), WhenFull::WaitUntil(until))
                    if Instant::now() + LOOK_AGAIN < until =>
                {
                    sleep(LOOK_AGAIN).await;
                }
                (looked, _) => return looked,
            }
        }
    }

    /// [`Usage::commit`] of what this replica holds for a request. Without that it is
    /// [`Usage::charge`]: what another replica holds expires by itself.
    ///
    /// # Errors
    /// Those of [`Usage::commit`]
    pub async fn commit_request(
        &self,
        user: &UserStanding,
        request: &RequestName,
        tokens: TokenCounts,
        when_full: WhenFull,
    ) -> Result<Committed> {
        let Some(handle) = self.handle_of(user, request) else {
            let charged = self.charge(user, request, tokens, when_full);
            return charged.await.map(Committed::Booked);
        };
        let committed = self.commit_handle(handle, tokens, Labels::default(), when_full);
        committed.await.map(|(committed, _)| committed)
    }

    /// [`Usage::release`] of what this replica holds for a request; without that nothing happens.
    pub fn release_request(&self, user: &UserStanding, request: &RequestName) -> Option<Ended> {
        let handle = self.handle_of(user, request)?;
        Some(self.keeper.release(handle.hold))
    }

    /// The handle of what this replica holds for a request, made this month or, at its turn, the last.
    fn handle_of(&self, user: &UserStanding, request: &RequestName) -> Option<Handle> {
        let now = self.now().trunc_subsecs(6);
        let period = Period::containing(now);
        let key = self
            .request_keys
            .key(user.id, &request.request_id, &request.model);
        let last_month = before(period);
        let (created_at, (hold, tokens)) = [now, last_month].into_iter().find_map(|at| {
            let held = self
                .keeper
                .hold_of(user.id, key.within(Period::containing(at)))?;
            Some((at, held))
        })?;
        let tiers = self.tiers();
        Some(Handle {
            hold,
            user_id: user.id,
            model: request.model.clone(),
            request_id: request.request_id.clone(),
            tokens,
            created_at,
            // It is live.
            expires_at: now,
            may_wait: tiers.limits_of(&user.tier).on_outage != OnOutage::Closed,
        })
    }
}

/// The end of the month before, as exactly as the database keeps it.
fn before(period: Period) -> DateTime<Utc> {
    period.start() - TimeDelta::microseconds(1)
}
