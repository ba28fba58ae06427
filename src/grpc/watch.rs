//! `WatchRevocations`: the events of a watch as messages of a stream.

use std::pin::Pin;

use chrono::Utc;
use futures_util::{Stream, stream};
use tonic::Status;

use super::status;
use crate::{
    auth::{Auth, Told, Watch},
    error::Result,
    proto::tollkeeper::auth::v1::{
        WatchReady, WatchRevocationsResponse, watch_revocations_response::Event,
    },
};

pub(super) type Messages =
    Pin<Box<dyn Stream<Item = Result<WatchRevocationsResponse, Status>> + Send>>;

/// A stream under way.
struct Running {
    auth: Auth,
    watch: Watch,
    /// The caller's own: it must stay good.
    credential: String,
    is_begun: bool,
}

/// Watches for the caller with `credential` until the stream ends.
///
/// # Errors
/// `Overloaded` · `Unavailable`
pub(super) fn messages(auth: &Auth, credential: &str) -> Result<Messages> {
    let running = Running {
        // Before `ready` is made: from its revision on nothing is missed.
        watch: auth.watch()?,
        auth: auth.clone(),
        credential: credential.to_owned(),
        is_begun: false,
    };
    Ok(Box::pin(stream::unfold(Some(running), |running| async {
        let mut running = running?;
        let next = running.next().await;
        // An error is the last message.
        let go_on = next.is_ok().then_some(running);
        Some((next, go_on))
    })))
}

impl Running {
    async fn next(&mut self) -> Result<WatchRevocationsResponse, Status> {
        let event = if self.is_begun {
            match self.watch.next().await? {
                Told::User(id) => Event::UserChanged(id.to_string()),
                Told::Reset => Event::Reset(()),
                Told::UpTo(revision) => {
                    self.auth.authenticate(&self.credential, Utc::now()).await?;
                    Event::KeepAlive(revision.to_string())
                }
                Told::Closing => return Err(status::shutting_down()),
            }
        } else {
            self.is_begun = true;
            let freshness = self.auth.freshness();
            Event::Ready(WatchReady {
                revision: freshness.known().to_string(),
                keep_alive_within: freshness.staleness_bound().try_into().ok(),
            })
        };
        Ok(WatchRevocationsResponse { event: Some(event) })
    }
}
