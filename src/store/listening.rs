//! A connection that hears what is told on a channel.

use std::{future::poll_fn, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_postgres::{AsyncMessage, Client, NoTls};

use super::{Store, connecting::config_of};
use crate::error::{Error, Result};

/// Between questions whether the other end is still there: a connection that was cut without a word is
/// silent like one on which nothing is told.
const PROBE: Duration = Duration::from_secs(2);

/// A connection of its own, outside the pool.
pub(super) struct Listening {
    pub(super) client: Arc<Client>,
    payloads: mpsc::UnboundedReceiver<String>,
    /// Reads the connection; ends with this.
    _reader: JoinSet<()>,
}

impl Store {
    /// Connects and listens. What is told before this returns may have been missed.
    ///
    /// # Errors
    /// `Unavailable`
    pub(super) async fn listen(&self, name: &str, channel: &str) -> Result<Listening> {
        timeout(self.connect_timeout, self.try_listen(name, channel))
            .await
            .map_err(|elapsed| Error::Unavailable(elapsed.into()))?
    }

    async fn try_listen(&self, name: &str, channel: &str) -> Result<Listening> {
        let unavailable = |error: tokio_postgres::Error| Error::Unavailable(error.into());
        let config = config_of(&self.url);
        let mut config = config.map_err(|error| Error::Unavailable(error.into()))?;
        config
            .application_name(name)
            .connect_timeout(self.connect_timeout);
        let (client, mut connection) = config.connect(NoTls).await.map_err(unavailable)?;
        let client = Arc::new(client);
        // Unbounded, but read at once: the reader of the other end does no I/O between messages.
        let (sender, payloads) = mpsc::unbounded_channel();
        let mut reader = JoinSet::new();
        let probed = Arc::clone(&client);
        reader.spawn(async move {
            let read = async {
                while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
                    if let AsyncMessage::Notification(notification) = message
                        && sender.send(notification.payload().to_owned()).is_err()
                    {
                        break;
                    }
                }
            };
            // Either one ends the connection, and with it what is listened to.
            tokio::select! {
                () = read => {}
                () = silence(&probed) => {}
            }
        });
        // What it tells itself has nothing to keep: it need not wait for a disk that stalls.
        client
            .batch_execute(&format!("SET synchronous_commit = off; LISTEN {channel}"))
            .await
            .map_err(unavailable)?;
        Ok(Listening {
            client,
            payloads,
            _reader: reader,
        })
    }
}

/// Until the other end does not answer.
async fn silence(client: &Client) {
    loop {
        sleep(PROBE).await;
        let probed = timeout(PROBE, client.simple_query("")).await;
        if !matches!(probed, Ok(Ok(_))) {
            return;
        }
    }
}

impl Listening {
    /// What is told next. Cancel-safe.
    ///
    /// # Errors
    /// `Unavailable` when the connection is lost: something may have been missed.
    pub(super) async fn next(&mut self) -> Result<String> {
        let payload = self.payloads.recv().await;
        payload.ok_or_else(|| Error::Unavailable("the listening connection was lost".into()))
    }
}
