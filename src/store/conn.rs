//! A connection of the pool, on loan.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use diesel_async::{
    AsyncConnection, AsyncPgConnection, TransactionManager, pooled_connection::deadpool::Object,
};
use tokio::{runtime::Handle, sync::OwnedSemaphorePermit, time::timeout};
use tokio_postgres::NoTls;

type Manager = <AsyncPgConnection as AsyncConnection>::TransactionManager;

/// Gives its place in the pool back only once Postgres does nothing for it any more.
///
/// A call that is cut short leaves its transaction, or its one statement that writes, behind, and Postgres
/// goes on with a statement that waits for a lock as long as the statement may run. Were the place free at
/// once, clients that give up and try again would take far more sessions of Postgres than the pool may hold.
pub(super) struct Conn {
    /// Taken when dropped.
    pooled: Option<Object<AsyncPgConnection>>,
    runtime: Handle,
    cancel_timeout: Duration,
    is_given_up: bool,
    /// To read much: over once Postgres reads no more.
    turn: Option<OwnedSemaphorePermit>,
}

impl Conn {
    pub(super) fn new(
        pooled: Object<AsyncPgConnection>,
        runtime: Handle,
        cancel_timeout: Duration,
    ) -> Self {
        Self {
            pooled: Some(pooled),
            runtime,
            cancel_timeout,
            is_given_up: false,
            turn: None,
        }
    }

    /// For a read that may take long, in its turn: until [`Conn::done`], whoever drops this ends the connection and
    /// what Postgres does for it.
    pub(super) fn reading_much(mut self, turn: OwnedSemaphorePermit) -> Self {
        (self.is_given_up, self.turn) = (true, Some(turn));
        self
    }

    /// All was read.
    pub(super) fn done(mut self) {
        self.is_given_up = false;
    }

    /// Does something that is no transaction, which alone would be given up when it is cut short: until it has
    /// ended, whoever drops this ends the connection and what Postgres does for it.
    pub(super) async fn unless_cut_short<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut AsyncPgConnection) -> T,
    ) -> T {
        self.is_given_up = true;
        let done = work(self).await;
        self.is_given_up = false;
        done
    }

    /// Ends the connection rather than to give it back: a statement on it is not answered.
    pub(super) fn give_up(mut self) {
        self.is_given_up = true;
    }
}

impl Deref for Conn {
    type Target = AsyncPgConnection;

    fn deref(&self) -> &AsyncPgConnection {
        self.pooled.as_ref().expect("taken only when dropped")
    }
}

impl DerefMut for Conn {
    fn deref_mut(&mut self) -> &mut AsyncPgConnection {
        self.pooled.as_mut().expect("taken only when dropped")
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let Some(mut pooled) = self.pooled.take() else {
            return;
        };
        if !self.is_given_up && !Manager::is_broken_transaction_manager(&mut *pooled) {
            return;
        }
        let cancel = pooled.cancel_token();
        let (cancel_timeout, turn) = (self.cancel_timeout, self.turn.take());
        self.runtime.spawn(async move {
            // Postgres hangs up once the cancellation is on its way; when it is silent, the pool
            // must not wait for ever.
            let _ = timeout(cancel_timeout, cancel.cancel_query(NoTls)).await;
            // The pool would discard it at its next use; the session is to end now.
            drop(Object::take(pooled));
            drop(turn);
        });
    }
}
