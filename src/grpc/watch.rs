//! `WatchRevocations`: the events of a watch as messages of a stream.

use std::pin::Pin;

use futures_util::{FutureExt as _, Stream, StreamExt as _, future, stream};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{access::Shown, status};
use crate::{
    auth::{Auth, Told, Watch},
    error::{Error, Result},
    proto::tollkeeper::auth::v1::{
        WatchReady, WatchRevocationsResponse, watch_revocations_response::Event,
    },
};

/// Events that wait for one reader; who is further behind is dropped.
const UNREAD: usize = 4096;

pub(super) type Messages =
    Pin<Box<dyn Stream<Item = Result<WatchRevocationsResponse, Status>> + Send>>;

/// A watch under way.
struct Running {
    auth: Auth,
    watch: Watch,
    shown: Shown,
}

/// Watches for the caller who has `shown` this until the stream ends.
///
/// # Errors
/// `Overloaded` · `Unavailable`
pub(super) fn messages(auth: &Auth, shown: Shown) -> Result<Messages> {
    let running = Running {
        // Before `ready` is made: from its revision on nothing is missed.
        watch: auth.watch()?,
        auth: auth.clone(),
        shown,
    };
    let freshness = auth.freshness();
    let ready = Event::Ready(WatchReady {
        revision: freshness.known().to_string(),
        keep_alive_within: freshness.staleness_bound().try_into().ok(),
    });
    let (sender, told) = mpsc::channel(UNREAD);
    // Of its own: nobody asks for the next message of a reader that never reads, and its place must
    // be free once its key is good no more.
    let ended = tokio::spawn(running.pass_on(sender));
    let why = ended.map(|why| Err(why.unwrap_or_else(|_| status::panicked())));
    let events = stream::once(future::ready(ready)).chain(ReceiverStream::new(told).map(event));
    let messages = events.map(|event| Ok(WatchRevocationsResponse { event: Some(event) }));
    Ok(Box::pin(messages.chain(why.into_stream())))
}

impl Running {
    /// Passes on what is told until the watch must end; returns why.
    async fn pass_on(mut self, reader: mpsc::Sender<Told>) -> Status {
        loop {
            let told = tokio::select! {
                told = self.next() => told,
                // The caller is gone: nobody hears why.
                () = reader.closed() => Err(Error::WatchTooSlow.into()),
            };
            match told.map(|told| reader.try_send(told)) {
                Ok(Ok(())) => {}
                Ok(Err(TrySendError::Full(_) | TrySendError::Closed(_))) => {
                    return Error::WatchTooSlow.into();
                }
                Err(why) => return why,
            }
        }
    }

    async fn next(&mut self) -> Result<Told, Status> {
        let told = self.watch.next().await?;
        match told {
            Told::UpTo(_) => {
                self.shown.check(&self.auth).await?;
            }
            Told::Closing => return Err(status::shutting_down()),
            Told::User(_) | Told::Reset => {}
        }
        Ok(told)
    }
}

fn event(told: Told) -> Event {
    match told {
        Told::User(id) => Event::UserChanged(id.to_string()),
        Told::UpTo(revision) => Event::KeepAlive(revision.to_string()),
        Told::Reset | Told::Closing => Event::Reset(()),
    }
}
