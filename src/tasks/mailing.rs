//! Sends the mails of the outbox. Replicas share the work as they do with other events; each mail is
//! composed when it is its turn, so that what has ended meanwhile is not sent.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aws_lc_rs::rand;
use chrono::{TimeDelta, Utc};
use tokio::{
    sync::Semaphore,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{info, warn};

use super::{backlog::Backlog, delivery::pause_after};
use crate::{
    auth::Auth,
    error::{Error, Result},
    mail::{Mailer, Unsent},
    model::{Count, MailNote},
    store::{OutboxEvent, Store},
};

/// Between looks for mails that are due.
const PERIOD: Duration = Duration::from_secs(1);

/// Between looks at what waits, for whoever watches.
const WATCH: Duration = Duration::from_secs(5);

/// Sent at a time by one replica.
const MAX_AT_ONCE: u32 = 8;

/// Most between attempts: what people wait for is good for an hour or so.
const MAX_RETRY: Duration = Duration::from_mins(10);

/// Until what this replica cannot read is looked at once more.
const UNREADABLE_RETRY: Duration = Duration::from_mins(1);

/// So often a mail is sent that the server may have: it may reach people each time.
const MAX_UNANSWERED: u32 = 3;

/// Least between those.
const UNANSWERED_RETRY: Duration = Duration::from_mins(1);

/// For so long what has no token is tried.
const NOTICE_WITHIN: TimeDelta = TimeDelta::days(1);

/// Between attempts to write down that a mail has gone: until then it may go twice.
const MARK_RETRY: Duration = Duration::from_millis(200);

/// Sends mails.
pub struct Mailing {
    store: Store,
    auth: Auth,
    mailer: Option<Arc<Mailer>>,
    status: Arc<MailStatus>,
    turns: Arc<Semaphore>,
}

/// What waits and what became of the others, for whoever watches.
#[derive(Debug, Default)]
pub struct MailStatus {
    /// Attempts of this replica.
    pub delivered: Count,
    /// To be tried again.
    pub failed: Count,
    /// Given up.
    pub refused: Count,
    /// Not wanted any more, or for nobody.
    pub dropped: Count,
    pub backlog: Backlog<Unsent>,
}

/// Waits for the mails that are being sent.
pub struct LastMails(Arc<Semaphore>);

impl LastMails {
    /// Until the server at the other end has said what becomes of them, and that is written down.
    pub async fn sent(self) {
        // Never closed.
        let _ = self.0.acquire_many(MAX_AT_ONCE).await;
    }
}

impl Mailing {
    /// Without a mailer mails stay where they are: another replica may have one.
    pub fn new(store: Store, auth: Auth, mailer: Option<Mailer>) -> Self {
        Self {
            store,
            auth,
            mailer: mailer.map(Arc::new),
            status: Arc::default(),
            turns: Arc::new(Semaphore::new(MAX_AT_ONCE as usize)),
        }
    }

    pub fn status(&self) -> Arc<MailStatus> {
        self.status.clone()
    }

    /// For the end of the server: a mail that is cut short may go twice.
    pub fn last(&self) -> LastMails {
        LastMails(self.turns.clone())
    }

    /// Runs until dropped; what is being sent then goes on.
    pub async fn run(self) {
        let mut looks = interval(WATCH);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut more_wait = false;
        loop {
            tokio::select! {
                _ = looks.tick() => {
                    if let Err(error) = self.look().await {
                        warn!(
                            error = error.with_causes(),
                            "the mails that wait could not be looked at"
                        );
                    }
                }
                _ = self.turns.acquire(), if more_wait => {}
                () = sleep(PERIOD) => {}
            }
            more_wait = match self.send_more().await {
                Ok(more_wait) => more_wait,
                Err(error) => {
                    warn!(error = error.with_causes(), "no mails could be claimed");
                    sleep(PERIOD).await;
                    false
                }
            };
        }
    }

    /// Whether there may be more than there were turns for.
    async fn send_more(&self) -> Result<bool> {
        let Some(mailer) = &self.mailer else {
            return Ok(false);
        };
        // Well beyond an attempt and the word of its end.
        let claim = mailer.longest() + mailer.longest() / 10 + Duration::from_mins(1);
        let free = self.turns.available_permits();
        if free == 0 {
            return Ok(true);
        }
        let claimed = self.store.outbox_claim(MailNote::KIND, claim, free).await?;
        let may_be_more = claimed.len() == free;
        for event in claimed {
            // There are as many: nobody else takes any.
            let Ok(turn) = self.turns.clone().acquire_owned().await else {
                return Ok(false);
            };
            let one = Sending {
                store: self.store.clone(),
                auth: self.auth.clone(),
                mailer: mailer.clone(),
                status: self.status.clone(),
                claimed_until: Instant::now() + claim,
                event,
            };
            tokio::spawn(async move {
                let id = one.event.id;
                if let Err(error) = one.run().await {
                    // It will be claimed, and maybe sent, once more.
                    warn!(
                        error = error.with_causes(),
                        event_id = %id,
                        "what became of a mail could not be written"
                    );
                }
                drop(turn);
            });
        }
        Ok(may_be_more)
    }

    async fn look(&self) -> Result<()> {
        let (pending, oldest) = self.store.mail_pending().await?;
        let failure = self.status.backlog.see(pending, oldest);
        if let Some(failure) = failure {
            warn!(%failure, pending, "mails cannot be sent, to be tried again");
        }
        Ok(())
    }
}

/// One attempt to send a mail.
struct Sending {
    store: Store,
    auth: Auth,
    mailer: Arc<Mailer>,
    status: Arc<MailStatus>,
    claimed_until: Instant,
    event: OutboxEvent,
}

impl Sending {
    async fn run(self) -> Result<()> {
        let (store, event) = (&self.store, &self.event);
        let Some(note) = MailNote::read(&event.payload) else {
            // A replica of a later version may know it.
            return self.unreadable("unknown mail").await;
        };
        let details = match store.mail_details(event.id, &note).await {
            Err(error @ Error::Internal(_)) => {
                warn!(error = error.with_causes(), event_id = %event.id, "a mail cannot be read");
                return self.unreadable("cannot be read").await;
            }
            details => details?,
        };
        let Some(details) = details else {
            self.status.dropped.add_one();
            return store.mail_drop(event.id).await;
        };
        let token = details
            .token
            .map(|token| self.auth.one_time_token(token.id));
        let sent = match self
            .mailer
            .compose(event.id, &details, token.as_deref(), Utc::now())
        {
            Ok(mail) => self.mailer.send(event.id, &mail).await,
            Err(unsent) => Err(unsent),
        };
        let Err(unsent) = sent else {
            self.status.delivered.add_one();
            return self.mark(None).await;
        };
        let is_late = details.token.is_none() && self.is_late();
        // The server may have it, whatever became of its word.
        let unanswered = note.unanswered + u32::from(unsent.is_unanswered());
        if unsent.is_final() || is_late || unanswered >= MAX_UNANSWERED {
            self.status.refused.add_one();
            info!(%unsent, event_id = %event.id, kind = details.kind.as_str(), "a mail is given up");
            return self.mark(Some(&unsent.to_string())).await;
        }
        self.status.failed.add_one();
        self.status.backlog.failed(unsent);
        let mut random = [0; 1];
        // Without randomness replicas may come together, no more.
        let _ = rand::fill(&mut random);
        let mut pause = pause_after(event.attempts, random[0]).min(MAX_RETRY);
        if unsent.is_unanswered() {
            pause = pause.max(UNANSWERED_RETRY);
            store.mail_unanswered(event, unanswered).await?;
        }
        store.outbox_failed(event, &unsent.to_string(), pause).await
    }

    /// Leaves it to others for a day.
    async fn unreadable(&self, why: &str) -> Result<()> {
        if self.is_late() {
            self.status.refused.add_one();
            warn!(why, event_id = %self.event.id, "a mail is given up");
            return self.mark(Some(why)).await;
        }
        self.status.failed.add_one();
        let failed = self.store.outbox_failed(&self.event, why, UNREADABLE_RETRY);
        failed.await
    }

    fn is_late(&self) -> bool {
        Utc::now() - self.event.created_at > NOTICE_WITHIN
    }

    /// Says so as long as the mail is ours: else it goes once more.
    async fn mark(&self, error: Option<&str>) -> Result<()> {
        loop {
            match self.store.mail_done(self.event.id, error).await {
                Err(_) if Instant::now() + MARK_RETRY < self.claimed_until => {
                    sleep(MARK_RETRY).await;
                }
                done => return done,
            }
        }
    }
}
