//! How connections are made, and what they set first.

use std::time::Duration;

use diesel::{ConnectionError, ConnectionResult};
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use tokio_postgres::{Config, NoTls};

use crate::error::in_one_line;

/// Between the statements of a transaction this service does nothing that takes long: one that stops there
/// must not keep its locks from others.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(5);

/// Some errors can be told apart by their English texts alone: the driver does not hand the SQLSTATE on. Not
/// every role may ask for those.
pub(super) const IN_ENGLISH: &str = "
    DO $$ BEGIN SET lc_messages = 'C'; EXCEPTION WHEN insufficient_privilege THEN NULL; END $$;";

/// What every connection sets first. No statement runs for so long that compiling it would pay, and some
/// look dear to the planner.
pub(super) fn session(statement_timeout: Duration) -> String {
    format!(
        "{IN_ENGLISH}
         SET application_name = 'tollkeeper'; SET timezone = 'UTC'; SET statement_timeout = {};
         SET idle_in_transaction_session_timeout = {}; SET jit = off;",
        statement_timeout.as_millis(),
        IDLE_IN_TRANSACTION.as_millis()
    )
}

/// What the ledger sets beside. Its few statements are planned once, maybe while a partition is empty:
/// each looks rows up by their key, and must not be planned to read the table. What it acknowledges is
/// on the disk whatever the database's default is.
pub(super) const LEDGER_SESSION: &str = "
    SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off;
    SELECT set_config('synchronous_commit', 'on', false)
    WHERE current_setting('synchronous_commit') = 'off'";

/// What leases set beside that. Their statements join a batch of keys to tables that fill within seconds
/// of the first plan: each key is looked up, and no plan reads all there is to find a few.
pub(super) const LEASE_SESSION: &str = "
    SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_material = off;";

/// Connects, and sets what a session is to have.
pub(super) async fn connect(url: &str, session: &str) -> ConnectionResult<AsyncPgConnection> {
    let mut conn = establish(url).await?;
    conn.batch_execute(session)
        .await
        .map_err(ConnectionError::CouldntSetupConfiguration)?;
    Ok(conn)
}

/// What a URL says. Whatever is wrong with it is said without its cause, which may quote a part of the
/// password.
pub(super) fn config_of(url: &str) -> ConnectionResult<Config> {
    let config = url.parse::<Config>();
    config.map_err(|error| ConnectionError::InvalidConnectionUrl(error.to_string()))
}

/// Connects. As `AsyncPgConnection::establish` does, which keeps the cause of a failure to itself.
async fn establish(url: &str) -> ConnectionResult<AsyncPgConnection> {
    let connected = config_of(url)?.connect(NoTls).await;
    let (client, connection) =
        connected.map_err(|error| ConnectionError::BadConnection(in_one_line(&error)))?;
    AsyncPgConnection::try_from_client_and_connection(client, connection).await
}
