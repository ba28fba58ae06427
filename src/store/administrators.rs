use diesel::{dsl::exists, prelude::*};
use diesel_async::{AsyncPgConnection, RunQueryDsl};

use super::schema::users;
use crate::{
    error::{Error, Result},
    model::{Role, UserId},
};

/// Held by whoever makes an administrator less.
const LOCK: i64 = 0x746f_6c6c_0003;

/// Asks, for an active administrator who is about to be none, whether another one stays. Those who ask
/// take turns until they have committed, so that two who remove each other do not both see the other.
///
/// To be called behind the lock of the user's row, and before that of any other.
///
/// # Errors
/// `LastAdmin` · `Unavailable`
pub(super) async fn another_admin_in_txn(id: UserId, conn: &mut AsyncPgConnection) -> Result<()> {
    diesel::define_sql_function! {
        fn pg_advisory_xact_lock(key: diesel::sql_types::BigInt);
    }
    diesel::select(pg_advisory_xact_lock(LOCK))
        .execute(conn)
        .await?;
    // A statement of its own: its snapshot sees what the turn before has left.
    let others = users::table
        .filter(users::role.eq(Role::Admin.as_str()))
        .filter(users::is_active)
        .filter(users::id.ne(id.0));
    let another: bool = diesel::select(exists(others.select(users::id)))
        .get_result(conn)
        .await?;
    match another {
        true => Ok(()),
        false => Err(Error::LastAdmin),
    }
}
