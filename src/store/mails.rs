//! Mails to people, as they wait in the outbox: written in the transaction that has them sent, composed
//! when they are sent.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::now,
    prelude::*,
    sql_types::{BigInt, Integer, Nullable, Text, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::{
    Store,
    errors::stored,
    outbox::OutboxEvent,
    schema::{one_time_tokens, outbox, sessions, users},
    throttle::throttle_take_in_txn,
};
use crate::{
    error::Result,
    model::{
        MailDetails, MailKind, MailNote, MailedToken, SessionStanding, ThrottleRule, User, UserId,
    },
};

impl Store {
    /// What a mail is to say, and to whom; `None` when it is to be sent no more: its token was used or has
    /// ended, or the user is gone.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_details(&self, event: Uuid, note: &MailNote) -> Result<Option<MailDetails>> {
        let mut conn = self.conn().await?;
        let queued_at: Option<DateTime<Utc>> = outbox::table
            .find(event)
            .select(outbox::created_at)
            .first(&mut conn)
            .await
            .optional()?;
        let Some(at) = queued_at else {
            return Ok(None);
        };
        let user: Option<(String, String, bool)> = users::table
            .find(note.user_id.0)
            .select((users::username, users::email, users::is_active))
            .first(&mut conn)
            .await
            .optional()?;
        let Some((username, email, is_active)) = user else {
            return Ok(None);
        };
        let mut details = MailDetails {
            kind: note.kind,
            to: match &note.to {
                Some(to) => to.clone(),
                None => stored("users.email", &email)?,
            },
            username: stored("users.username", &username)?,
            token: None,
            at,
            user_agent: String::new(),
            address: String::new(),
        };
        if let Some(token_id) = note.token_id {
            let token: Option<(String, DateTime<Utc>, DateTime<Utc>)> = one_time_tokens::table
                .find(token_id.0)
                .filter(one_time_tokens::expires_at.gt(now))
                .select((
                    one_time_tokens::email,
                    one_time_tokens::created_at,
                    one_time_tokens::expires_at,
                ))
                .first(&mut conn)
                .await
                .optional()?;
            let Some((email, created_at, expires_at)) = token.filter(|_| is_active) else {
                return Ok(None);
            };
            details.to = stored("one_time_tokens.email", &email)?;
            details.token = Some(MailedToken {
                id: token_id,
                created_at,
                expires_at,
            });
        }
        if let Some(session_id) = note.session_id {
            let session: Option<(String, Option<String>)> = sessions::table
                .find(session_id.0)
                .select((sessions::user_agent, sessions::address))
                .first(&mut conn)
                .await
                .optional()?;
            let Some((user_agent, address)) = session else {
                return Ok(None);
            };
            details.user_agent = user_agent;
            details.address = address.unwrap_or_default();
        }
        Ok(Some(details))
    }

    /// Says that a mail has gone, or, with an error, that it never will. The address goes with it.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_done(&self, event: Uuid, error: Option<&str>) -> Result<()> {
        let mut conn = self.conn().await?;
        diesel::sql_query(
            "UPDATE outbox SET delivered_at = now(), last_error = $2, payload = payload - 'to'
             WHERE id = $1",
        )
        .bind::<SqlUuid, _>(event)
        .bind::<Nullable<Text>, _>(error)
        .execute(&mut conn)
        .await?;
        Ok(())
    }

    /// Keeps how often the server may have had a mail without a word of it.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_unanswered(&self, event: &OutboxEvent, times: u32) -> Result<()> {
        let mut conn = self.conn().await?;
        diesel::sql_query(
            "UPDATE outbox SET payload = payload || jsonb_build_object('unanswered', $3)
             WHERE id = $1 AND attempts = $2 AND delivered_at IS NULL",
        )
        .bind::<SqlUuid, _>(event.id)
        .bind::<Integer, _>(event.attempts)
        .bind::<BigInt, _>(i64::from(times))
        .execute(&mut conn)
        .await?;
        Ok(())
    }

    /// Forgets a mail that is to be sent no more.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_drop(&self, event: Uuid) -> Result<()> {
        let mut conn = self.conn().await?;
        diesel::delete(outbox::table.find(event))
            .execute(&mut conn)
            .await?;
        Ok(())
    }

    /// How many mails wait (10,000 stand for more), and the age of the oldest.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_pending(&self) -> Result<(u64, Option<Duration>)> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = BigInt)]
            pending: i64,
            #[diesel(sql_type = Nullable<BigInt>)]
            oldest: Option<i64>,
        }
        let mut conn = self.conn().await?;
        let row: Row = diesel::sql_query(
            "SELECT count(*) AS pending,
                 (extract(epoch FROM now() - min(created_at)) * 1000)::bigint AS oldest
             FROM (SELECT created_at FROM outbox
                   WHERE kind = $1 AND delivered_at IS NULL LIMIT 10000) AS counted",
        )
        .bind::<Text, _>(MailNote::KIND)
        .get_result(&mut conn)
        .await?;
        let age = |millis: i64| Duration::from_millis(u64::try_from(millis).unwrap_or(0));
        Ok((u64::try_from(row.pending).unwrap_or(0), row.oldest.map(age)))
    }
}

/// Tells a user of something at the address that they have now. To one that nobody has proven nothing is
/// told: it may be a stranger's.
pub(super) async fn notice_in_txn(
    kind: MailKind,
    user: &User,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    match user.email_verified_at {
        Some(_) => notice_to_in_txn(kind, user, conn).await,
        None => Ok(()),
    }
}

/// The same, for an address that is proven at this moment.
pub(super) async fn notice_to_in_txn(
    kind: MailKind,
    user: &User,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    tell_in_txn(MailNote::new(kind, user.id), user, conn).await
}

/// Tells a user of a login, as [`notice_in_txn`] does.
pub(super) async fn login_notice_in_txn(
    standing: &SessionStanding,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    if standing.user.email_verified_at.is_none() {
        return Ok(());
    }
    let note = MailNote {
        session_id: Some(standing.session.id),
        ..MailNote::new(MailKind::NewLogin, standing.user.id)
    };
    tell_in_txn(note, &standing.user, conn).await
}

/// Has a notice sent to the address of this moment, whatever it is by the time, unless there were too many.
async fn tell_in_txn(note: MailNote, user: &User, conn: &mut AsyncPgConnection) -> Result<()> {
    let limit = (
        format!("mail {} {}", user.id, note.kind.as_str()),
        ThrottleRule::REPEATED,
    );
    if throttle_take_in_txn(&[limit], conn).await?.is_some() {
        return Ok(());
    }
    let note = MailNote {
        to: Some(user.email.clone()),
        ..note
    };
    mail_in_txn(&note, conn).await
}

/// Puts a mail into the outbox.
pub(super) async fn mail_in_txn(note: &MailNote, conn: &mut AsyncPgConnection) -> Result<()> {
    diesel::insert_into(outbox::table)
        .values((
            outbox::id.eq(Uuid::now_v7()),
            outbox::kind.eq(MailNote::KIND),
            outbox::payload.eq(note.payload()),
        ))
        .execute(conn)
        .await?;
    Ok(())
}

/// Forgets the tokens of a user and the mails to them.
pub(super) async fn mails_forget_in_txn(id: UserId, conn: &mut AsyncPgConnection) -> Result<()> {
    diesel::delete(one_time_tokens::table.filter(one_time_tokens::user_id.eq(id.0)))
        .execute(conn)
        .await?;
    diesel::sql_query("DELETE FROM outbox WHERE kind = 'mail' AND payload ->> 'user_id' = $1")
        .bind::<Text, _>(id.to_string())
        .execute(conn)
        .await?;
    Ok(())
}
