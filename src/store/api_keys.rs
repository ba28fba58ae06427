use chrono::{DateTime, Utc};
use diesel::{
    dsl::sql,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, QueryFragment, QueryId},
    sql_types::{Array, Bool, Nullable, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    audit::audit_insert_in_txn,
    errors::stored,
    schema::{api_keys, users},
    users::UserRow,
};
use crate::{
    error::{Error, Result},
    model::{
        ApiKey, ApiKeyId, ApiKeyName, ApiKeyScopes, ApiKeyStanding, AuditAction, AuditEvent,
        Origin, Page, PageRequest, UserId,
    },
};

/// An API key to create. Not `Debug`, as nothing that holds a hash.
pub struct NewApiKey {
    pub user_id: UserId,
    pub name: ApiKeyName,
    pub scopes: ApiKeyScopes,
    pub key_hash: Vec<u8>,
    pub expires_at: Option<DateTime<Utc>>,
}

impl Store {
    /// Creates an API key, unless its user has `limit` live ones. Calls for one user take turns, so
    /// that racing ones cannot exceed it together.
    ///
    /// # Errors
    /// `TooManyKeys` · `UserNotFound` · `Unavailable`
    pub async fn api_key_insert(
        &self,
        new: &NewApiKey,
        limit: u32,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<ApiKey> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            users::table
                .find(new.user_id.0)
                .select(users::id)
                .for_no_key_update()
                .first::<Uuid>(conn)
                .await
                .optional()?
                .ok_or(Error::UserNotFound)?;
            let live: i64 = api_keys::table
                .filter(api_keys::user_id.eq(new.user_id.0))
                .filter(is_live(now))
                .count()
                .get_result(conn)
                .await?;
            if live >= i64::from(limit) {
                return Err(Error::TooManyKeys { limit });
            }
            let row: ApiKeyRow = diesel::insert_into(api_keys::table)
                .values((
                    api_keys::id.eq(ApiKeyId::new().0),
                    api_keys::user_id.eq(new.user_id.0),
                    api_keys::name.eq(new.name.as_str()),
                    api_keys::key_hash.eq(&new.key_hash),
                    api_keys::scopes.eq(new.scopes.names()),
                    api_keys::created_at.eq(now),
                    api_keys::expires_at.eq(new.expires_at),
                ))
                .returning(ApiKeyRow::as_returning())
                .get_result(conn)
                .await?;
            let details = json!({
                "user_id": row.user_id.to_string(),
                "name": row.name,
                "scopes": row.scopes,
                "expires_at": row.expires_at,
            });
            let event =
                AuditEvent::new(AuditAction::ApiKeyCreated, row.id, origin).about(new.user_id);
            audit_insert_in_txn(&event.with_details(details), conn).await?;
            row.try_into()
        })
        .await
    }

    /// Finds an API key by its hash, with its user; `None` when there is no such key. One that
    /// `is_known` to have been a key does not wait behind those that anybody can make up.
    ///
    /// `about_to_read` is told whose key it is before the answer is read, and what it returns comes
    /// with the answer: what outdates an answer must be noted before it is read, and depends on the
    /// user. The owner of a key never changes.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn api_key_by_hash<S>(
        &self,
        key_hash: &[u8],
        is_known: bool,
        about_to_read: impl FnOnce(UserId) -> S,
    ) -> Result<Option<(S, ApiKeyStanding)>> {
        let _turn = self.key_lookup(is_known).await?;
        let mut conn = self.conn().await?;
        let owner: Option<(Uuid, Uuid)> = api_keys::table
            .filter(api_keys::key_hash.eq(key_hash))
            .select((api_keys::id, api_keys::user_id))
            .first(&mut conn)
            .await
            .optional()?;
        let Some((id, user_id)) = owner else {
            return Ok(None);
        };
        let noted = about_to_read(UserId(user_id));
        let found: Option<(ApiKeyRow, UserRow)> = api_keys::table
            .inner_join(users::table)
            .filter(api_keys::id.eq(id))
            .select((ApiKeyRow::as_select(), UserRow::as_select()))
            .first(&mut conn)
            .await
            .optional()?;
        let Some((key, user)) = found else {
            return Ok(None);
        };
        let standing = ApiKeyStanding {
            key: key.try_into()?,
            user: user.try_into()?,
        };
        Ok(Some((noted, standing)))
    }

    /// Lists a user's API keys, newest first: the live ones or all.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn api_key_list(
        &self,
        user_id: UserId,
        show_ended: bool,
        page: &PageRequest<Uuid>,
        now: DateTime<Utc>,
    ) -> Result<Page<ApiKey>> {
        let mut query = api_keys::table
            .filter(api_keys::user_id.eq(user_id.0))
            .select(ApiKeyRow::as_select())
            .order(api_keys::id.desc())
            .limit(page.size + 1)
            .into_boxed();
        if !show_ended {
            query = query.filter(is_live(now));
        }
        if let Some(after) = page.after {
            query = query.filter(api_keys::id.lt(after));
        }
        let mut conn = self.conn().await?;
        let rows: Vec<ApiKeyRow> = query.load(&mut conn).await?;
        let keys = rows
            .into_iter()
            .map(ApiKey::try_from)
            .collect::<Result<Vec<_>>>()?;
        Ok(Page::from_rows(keys, page, |key| key.id.0))
    }

    /// Ends an API key of a user for good. Ending it again changes nothing.
    ///
    /// # Errors
    /// `ApiKeyNotFound`, also when it is somebody else's · `Unavailable`
    pub async fn api_key_revoke(
        &self,
        id: ApiKeyId,
        user_id: UserId,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<ApiKey> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let own = api_keys::table
                .filter(api_keys::id.eq(id.0))
                .filter(api_keys::user_id.eq(user_id.0));
            let revoked: Option<ApiKeyRow> = diesel::update(own)
                .filter(api_keys::revoked_at.is_null())
                .set(api_keys::revoked_at.eq(now))
                .returning(ApiKeyRow::as_returning())
                .get_result(conn)
                .await
                .optional()?;
            if let Some(row) = revoked {
                let event = AuditEvent::new(AuditAction::ApiKeyRevoked, id.0, origin)
                    .about(user_id)
                    .with_details(json!({"user_id": user_id.to_string(), "name": row.name}));
                audit_insert_in_txn(&event, conn).await?;
                return row.try_into();
            }
            own.select(ApiKeyRow::as_select())
                .first(conn)
                .await
                .optional()?
                .ok_or(Error::ApiKeyNotFound)?
                .try_into()
        })
        .await
    }

    /// Notes when API keys were last used, in one statement. A time before the one that is noted
    /// changes nothing, nor does an id that no key has.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn api_key_note_uses(&self, uses: &[(ApiKeyId, DateTime<Utc>)]) -> Result<()> {
        let (ids, times) = uses.iter().map(|(id, at)| (id.0, *at)).unzip();
        let mut conn = self.conn().await?;
        NoteUses { ids, times }.execute(&mut conn).await?;
        Ok(())
    }

    /// Deletes up to `limit` API keys that ended before `before`; returns how many.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn api_key_sweep(&self, before: DateTime<Utc>, limit: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let ended: Vec<Uuid> = api_keys::table
                // The condition of the index is repeated: Postgres would not find it otherwise.
                .filter(
                    sql::<Bool>(
                        "(revoked_at IS NOT NULL OR expires_at IS NOT NULL)
                            AND LEAST(revoked_at, expires_at) < ",
                    )
                    .bind::<Timestamptz, _>(before),
                )
                .select(api_keys::id)
                .limit(limit)
                .load(conn)
                .await?;
            let ended = api_keys::table.filter(api_keys::id.eq_any(ended));
            Ok(diesel::delete(ended).execute(conn).await?)
        })
        .await
    }
}

/// Ends all keys of a user; returns how many. Writes no event.
pub(super) async fn api_key_revoke_all_in_txn(
    user_id: UserId,
    conn: &mut AsyncPgConnection,
) -> Result<usize> {
    let live = api_keys::table
        .filter(api_keys::user_id.eq(user_id.0))
        .filter(api_keys::revoked_at.is_null());
    // In the order that others lock them in.
    let locked: Vec<Uuid> = live
        .select(api_keys::id)
        .order(api_keys::id)
        .for_no_key_update()
        .load(conn)
        .await?;
    let locked = api_keys::table.filter(api_keys::id.eq_any(locked));
    let revoked = diesel::update(locked)
        .set(api_keys::revoked_at.eq(diesel::dsl::sql("now()")))
        .execute(conn)
        .await?;
    Ok(revoked)
}

/// Neither revoked nor expired.
fn is_live(
    now: DateTime<Utc>,
) -> Box<dyn BoxableExpression<api_keys::table, Pg, SqlType = Nullable<Bool>>> {
    let unexpired = api_keys::expires_at
        .is_null()
        .or(api_keys::expires_at.gt(now));
    Box::new(api_keys::revoked_at.is_null().and(unexpired))
}

/// See [`Store::api_key_note_uses`].
///
/// A fragment of its own with a static id, so that it is prepared once. Rows are locked in the order
/// of their ids: replicas that note the same keys never wait for each other in a circle.
struct NoteUses {
    ids: Vec<Uuid>,
    times: Vec<DateTime<Utc>>,
}

impl QueryFragment<Pg> for NoteUses {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "UPDATE api_keys SET last_used_at = GREATEST(api_keys.last_used_at, used.at)
            FROM (
                SELECT k.id, new.at FROM unnest(",
        );
        out.push_bind_param::<Array<SqlUuid>, _>(&self.ids)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<Timestamptz>, _>(&self.times)?;
        out.push_sql(
            ") AS new (id, at) JOIN api_keys AS k USING (id)
                WHERE k.last_used_at IS NULL OR k.last_used_at < new.at
                ORDER BY k.id FOR NO KEY UPDATE OF k
            ) AS used
            WHERE api_keys.id = used.id",
        );
        Ok(())
    }
}

impl QueryId for NoteUses {
    type QueryId = Self;
    const HAS_STATIC_QUERY_ID: bool = true;
}

/// An API key as stored, without its hash.
#[derive(Queryable, Selectable)]
#[diesel(table_name = api_keys, check_for_backend(diesel::pg::Pg))]
struct ApiKeyRow {
    id: Uuid,
    user_id: Uuid,
    name: String,
    scopes: Vec<String>,
    created_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
    revoked_at: Option<DateTime<Utc>>,
    last_used_at: Option<DateTime<Utc>>,
}

impl TryFrom<ApiKeyRow> for ApiKey {
    type Error = Error;

    fn try_from(row: ApiKeyRow) -> Result<Self> {
        let scopes = ApiKeyScopes::parse(&row.scopes)
            .map_err(|violation| Error::internal(format!("stored api_keys.scopes {violation}")))?;
        Ok(Self {
            id: ApiKeyId(row.id),
            user_id: UserId(row.user_id),
            name: stored("api_keys.name", &row.name)?,
            scopes,
            created_at: row.created_at,
            expires_at: row.expires_at,
            revoked_at: row.revoked_at,
            last_used_at: row.last_used_at,
        })
    }
}
