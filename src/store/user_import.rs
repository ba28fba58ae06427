//! Users of other systems, a batch at a time.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Bool, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::Store;
use crate::{
    error::{Error, Result},
    model::{AuditAction, ImportSource, ImportStanding, ImportUser, Origin, UserId},
};

impl Store {
    /// What there is already of each of these users, in their order.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn user_import_look(&self, users: &[&ImportUser]) -> Result<Vec<ImportStanding>> {
        #[derive(QueryableByName)]
        struct Found {
            #[diesel(sql_type = BigInt)]
            place: i64,
            #[diesel(sql_type = Text)]
            what: String,
            #[diesel(sql_type = SqlUuid)]
            id: Uuid,
        }
        let _turn = self.bulk_read().await?;
        let mut conn = self.conn().await?;
        // Names in lower case are ASCII, and compared as the indexes have them. An id that was derived is
        // compared without its time, as ImportKey::is_of does: the row may have said another one.
        let found: Vec<Found> = diesel::sql_query(
            "WITH wanted AS MATERIALIZED (
                 SELECT * FROM unnest($1, $2, $3, $4)
                     WITH ORDINALITY AS w (id, email, username, is_derived, place)
             )
             SELECT place, 'id' AS what, u.id FROM wanted w JOIN users u ON u.id = w.id
             UNION ALL
             SELECT place, 'erased', e.user_id FROM wanted w JOIN user_erasures e ON e.user_id = w.id
             UNION ALL
             SELECT place, 'erased', e.user_id
             FROM wanted w JOIN user_erasures e
                 ON substr(e.user_id::text, 15) = substr(w.id::text, 15)
             WHERE w.is_derived
             UNION ALL
             SELECT place, 'email', u.id
             FROM wanted w JOIN users u ON lower(u.email COLLATE \"C\") = w.email
             UNION ALL
             SELECT place, 'username', u.id
             FROM wanted w JOIN users u ON lower(u.username COLLATE \"C\") = w.username",
        )
        .bind::<Array<SqlUuid>, _>(ids(users))
        .bind::<Array<Text>, _>(column(users, |user| user.person.email.as_str().to_ascii_lowercase()))
        .bind::<Array<Text>, _>(column(users, |user| user.person.username.as_str().to_ascii_lowercase()))
        .bind::<Array<Bool>, _>(column(users, |user| user.key.is_derived()))
        .load(&mut conn)
        .await?;
        let mut standings = vec![ImportStanding::default(); users.len()];
        for Found { place, what, id } in found {
            let standing = usize::try_from(place - 1).ok();
            let standing = standing.and_then(|place| standings.get_mut(place));
            let standing =
                standing.ok_or_else(|| Error::internal("a row that was not asked for"))?;
            match &*what {
                "id" => standing.has_id = true,
                "erased" => standing.is_erased = true,
                "email" => standing.email = Some(id),
                _ => standing.username = Some(id),
            }
        }
        Ok(standings)
    }

    /// Inserts users, in one statement with what the trail says of each; answers which it were. Those
    /// whose id, address or username somebody has, or got meanwhile, are left out.
    ///
    /// # Errors
    /// `Unavailable`: perhaps all are there, perhaps none; it is safe to repeat
    pub async fn user_import(
        &self,
        users: &[&ImportUser],
        source: &ImportSource,
        origin: &Origin,
    ) -> Result<HashSet<UserId>> {
        #[derive(QueryableByName)]
        struct Inserted {
            #[diesel(sql_type = SqlUuid)]
            id: Uuid,
        }
        let mut users = users.to_vec();
        // In one order, so that imports beside each other wait rather than deadlock.
        users.sort_by_cached_key(|user| user.person.email.as_str().to_ascii_lowercase());
        let times = |time: fn(&ImportUser) -> Option<DateTime<Utc>>| column(&users, time);
        let _turn = self.bulk_read().await?;
        let mut conn = self.conn().await?;
        // LEAST passes nulls over.
        let inserted: Vec<Inserted> = diesel::sql_query(
            "WITH new AS MATERIALIZED (
                 SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $20)
                     WITH ORDINALITY AS n (id, email, username, full_name, password_hash, role, tier,
                         is_active, email_verified_at, created_at, last_login_at, event_id,
                         is_derived, place)
             ), inserted AS (
                 INSERT INTO users (id, email, username, full_name, password_hash, role, tier,
                     is_active, email_verified_at, created_at, last_login_at)
                 SELECT id, email, username, full_name, password_hash, role, tier, is_active,
                     email_verified_at, LEAST(created_at, now()),
                     CASE WHEN last_login_at IS NOT NULL THEN LEAST(last_login_at, now()) END
                 FROM new
                 WHERE NOT EXISTS (SELECT FROM user_erasures e WHERE e.user_id = new.id)
                     AND NOT (is_derived AND substr(id::text, 15) IN (
                         SELECT substr(e.user_id::text, 15) FROM user_erasures e))
                 ORDER BY place
                 ON CONFLICT DO NOTHING
                 RETURNING id, role, tier
             ), trail AS (
                 INSERT INTO audit_events (id, action, actor_kind, actor_id, target_id, user_id,
                     request_id, address, user_agent, details)
                 SELECT new.event_id, $13, $14, $15, inserted.id, inserted.id, $16, $17, $18,
                     jsonb_build_object('source', $19::text, 'tier', inserted.tier,
                         'role', inserted.role)
                 FROM inserted JOIN new USING (id)
             )
             SELECT id FROM inserted",
        )
        .bind::<Array<SqlUuid>, _>(ids(&users))
        .bind::<Array<Text>, _>(column(&users, |user| user.person.email.as_str()))
        .bind::<Array<Text>, _>(column(&users, |user| user.person.username.as_str()))
        .bind::<Array<Text>, _>(column(&users, |user| user.person.full_name.as_str()))
        .bind::<Array<Nullable<Text>>, _>(column(&users, |user| user.password_hash.as_deref()))
        .bind::<Array<Text>, _>(column(&users, |user| user.role.as_str()))
        .bind::<Array<Text>, _>(column(&users, |user| user.tier.as_str()))
        .bind::<Array<Bool>, _>(column(&users, |user| user.is_active))
        .bind::<Array<Nullable<Timestamptz>>, _>(times(|user| user.email_verified_at))
        .bind::<Array<Nullable<Timestamptz>>, _>(times(|user| user.created_at))
        .bind::<Array<Nullable<Timestamptz>>, _>(times(|user| user.last_login_at))
        .bind::<Array<SqlUuid>, _>(column(&users, |_| Uuid::now_v7()))
        .bind::<Text, _>(AuditAction::UserImported.as_str())
        .bind::<Text, _>(origin.actor.kind().as_str())
        .bind::<Nullable<SqlUuid>, _>(origin.actor.id())
        .bind::<Text, _>(&origin.request_id)
        .bind::<Nullable<Text>, _>(origin.address.map(|address| address.to_string()))
        .bind::<Text, _>(&origin.user_agent)
        .bind::<Text, _>(source.as_str())
        .bind::<Array<Bool>, _>(column(&users, |user| user.key.is_derived()))
        .load(&mut conn)
        .await?;
        Ok(inserted.into_iter().map(|row| UserId(row.id)).collect())
    }
}

fn ids(users: &[&ImportUser]) -> Vec<Uuid> {
    column(users, |user| user.key.id().0)
}

/// One column of all rows.
fn column<'a, T>(users: &[&'a ImportUser], of: impl Fn(&'a ImportUser) -> T) -> Vec<T> {
    users.iter().map(|user| of(user)).collect()
}
