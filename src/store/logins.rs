//! What a login reads and writes: one statement before the password is checked, one when it was right. Each
//! is prepared once on a connection. Of a plain login each is a transaction; a code, a new hash or a notice is
//! written together with the second.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::exists,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    result::{DatabaseErrorKind, Error as DieselError},
    sql_types::{Bool, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;

use super::{
    Store,
    audit::{NewAuditEvent, audit_insert_in_txn},
    mails::login_notice_in_txn,
    mfa::{lock_in_txn, mfa_code_use_in_txn},
    prepared::prepared,
    schema::{sessions, users},
    sessions::{SessionRow, standing},
    throttle::ThrottleRow,
    users::{Credentials, LOWER_EMAIL, LOWER_USERNAME, UserRow},
};
use crate::{
    error::{Error, Result},
    model::{
        AuditAction, AuditEvent, Factor, Identifier, Origin, SessionId, SessionStanding,
        ThrottleState, UsedCode, UserId,
    },
};

/// What a login is decided by, as of one moment.
pub struct LoginStanding {
    /// `None`: nobody has the name.
    pub known: Option<Credentials>,
    /// What is known of each that failures count against, if anything is.
    pub throttle: HashMap<String, ThrottleState>,
}

/// What failures of a login count against, as far as it is known before the user is.
pub struct LoginSubjects {
    /// Against a user in a network of theirs: this behind it.
    pub at_home: Option<String>,
    /// Against the name, when nobody has it.
    pub nobody: String,
    /// Against a network.
    pub from: Option<String>,
}

impl LoginSubjects {
    /// Against a user: this and their id.
    pub const USER: &'static str = "user ";
}

/// A login to record.
pub struct NewSession<'a> {
    pub id: SessionId,
    pub user_id: UserId,
    pub idle_expires_at: DateTime<Utc>,
    pub absolute_expires_at: DateTime<Utc>,
    /// Takes the place of the user's hash when that is weaker than the configured scheme.
    pub rehashed_password: Option<String>,
    /// The second factor that opens it beside the password; used up with that.
    pub code: Option<UsedCode>,
    /// Mails the user if they have not logged in so before.
    pub tell_if_new: bool,
    pub origin: &'a Origin,
}

impl Store {
    /// Finds what a login is checked against, in any case of the name, and what failed before. For a name
    /// that nobody has it takes as long.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn login_standing(
        &self,
        identifier: &Identifier,
        subjects: &LoginSubjects,
    ) -> Result<LoginStanding> {
        type Row = (Option<UserRow>, Option<String>, Option<ThrottleRow>);
        let mut conn = self.conn().await?;
        let rows: Vec<Row> = match identifier {
            Identifier::Email(email) => {
                let read = ReadLogin::new(email.as_str(), subjects);
                ByEmail(read).load(&mut conn).await?
            }
            Identifier::Username(username) => {
                let read = ReadLogin::new(username.as_str(), subjects);
                ByUsername(read).load(&mut conn).await?
            }
        };
        let (mut known, mut throttle) = (None, HashMap::new());
        for (user, password_hash, state) in rows {
            if let (None, Some(user)) = (&known, user) {
                let user = user.try_into()?;
                known = Some(Credentials {
                    user,
                    password_hash,
                });
            }
            throttle.extend(state.map(|row| (row.subject.clone(), row.into())));
        }
        Ok(LoginStanding { known, throttle })
    }

    /// Opens a session, marks the login and replaces an outdated hash, together.
    ///
    /// `checked_hash` is the hash that the password was checked against: should it have changed
    /// meanwhile, the login does not count.
    ///
    /// A dropped future leaves the whole login or none: what waits for a lock is cancelled, and opens nothing
    /// once the lock is free.
    ///
    /// # Errors
    /// `InvalidCredentials` · `AccountDisabled` · `MfaCodeInvalid` · `MfaChallengeInvalid` when there is a
    /// session of this id, or a second factor is asked for since this moment · `Unavailable`
    pub async fn session_open(
        &self,
        new: NewSession<'_>,
        checked_hash: &str,
        now: DateTime<Utc>,
    ) -> Result<SessionStanding> {
        let is_all = new.code.is_none() && new.rehashed_password.is_none() && !new.tell_if_new;
        let mut conn = self.conn().await?;
        if is_all {
            let opening =
                async |conn: &mut AsyncPgConnection| open(&new, checked_hash, now, conn).await;
            return conn.unless_cut_short(opening).await;
        }
        conn.transaction::<_, Error, _>(async |conn| {
            if let Some(code) = &new.code {
                let locked = lock_in_txn(new.user_id, Some(checked_hash), conn).await;
                locked.map_err(|error| match error {
                    Error::UserNotFound => Error::InvalidCredentials,
                    error => error,
                })?;
                mfa_code_use_in_txn(code, conn).await?;
            }
            let standing = open(&new, checked_hash, now, conn).await?;
            let further = [
                (new.code.as_ref().map(|code| code.what.factor()) == Some(Factor::RecoveryCode))
                    .then_some(AuditAction::RecoveryCodeUsed),
                (new.rehashed_password.is_some()).then_some(AuditAction::PasswordRehashed),
            ];
            for action in further.into_iter().flatten() {
                let event = AuditEvent::of_user(action, new.user_id, new.origin);
                audit_insert_in_txn(&event, conn).await?;
            }
            if new.tell_if_new && session_is_strange_in_txn(&new, conn).await? {
                login_notice_in_txn(&standing, conn).await?;
            }
            Ok(standing)
        })
        .await
    }
}

/// What all logins write: see [`OpenSession`].
async fn open(
    new: &NewSession<'_>,
    checked_hash: &str,
    now: DateTime<Utc>,
    conn: &mut AsyncPgConnection,
) -> Result<SessionStanding> {
    let mut details = json!({"user_id": new.user_id.to_string()});
    if let Some(code) = &new.code {
        details["mfa"] = code.what.factor().as_str().into();
    }
    let event = AuditEvent::new(AuditAction::SessionOpened, new.id.0, new.origin)
        .about(new.user_id)
        .with_details(details);
    let opening = OpenSession {
        new,
        address: new.origin.address.map(|address| address.to_string()),
        checked_hash,
        now,
        is_by_mfa: new.code.is_some(),
        event: NewAuditEvent::of(&event),
        session: columns::<SessionRow>(),
        user: columns::<UserRow>(),
    };
    let opened: Option<(SessionRow, UserRow)> = opening
        .get_result(conn)
        .await
        .optional()
        .map_err(on_challenged)?;
    if let Some((session, user)) = opened {
        return standing(session, user);
    }
    let is_unchanged: bool = diesel::select(exists(
        users::table
            .filter(users::id.eq(new.user_id.0))
            .filter(users::password_hash.eq(checked_hash))
            .select(users::id),
    ))
    .get_result(conn)
    .await?;
    Err(match is_unchanged {
        true => Error::AccountDisabled,
        false => Error::InvalidCredentials,
    })
}

/// What keeps a session from being opened: the challenge was used before, or, by the check
/// `sessions_mfa_required`, a second factor is asked for since this moment.
fn on_challenged(error: DieselError) -> Error {
    use DatabaseErrorKind as Kind;
    match error {
        DieselError::DatabaseError(Kind::UniqueViolation | Kind::CheckViolation, ref about)
            if matches!(
                about.constraint_name(),
                Some("sessions_pkey" | "sessions_mfa_required")
            ) =>
        {
            Error::MfaChallengeInvalid
        }
        error => error.into(),
    }
}

/// Whether a user who has other sessions has none from the same address with the same client.
async fn session_is_strange_in_txn(
    new: &NewSession<'_>,
    conn: &mut AsyncPgConnection,
) -> Result<bool> {
    let others = sessions::table
        .filter(sessions::user_id.eq(new.user_id.0))
        .filter(sessions::id.ne(new.id.0));
    let address = new.origin.address.map(|address| address.to_string());
    let alike = others
        .filter(sessions::user_agent.eq(&new.origin.user_agent))
        .filter(sessions::address.is_not_distinct_from(address));
    let (any, alike): (bool, bool) = diesel::select((
        exists(others.select(sessions::id)),
        exists(alike.select(sessions::id)),
    ))
    .get_result(conn)
    .await?;
    Ok(any && !alike)
}

/// The columns of a row, as a statement names them, and their types.
type Columns<Row> = <Row as Selectable<Pg>>::SelectExpression;
type Types<Row> = <Columns<Row> as Expression>::SqlType;

fn columns<Row: Selectable<Pg>>() -> Columns<Row> {
    Row::construct_selection()
}

/// One row for each of the subjects of which something is known, at least one; each with the user, if there
/// is one.
struct ReadLogin<'a> {
    name: String,
    subjects: &'a LoginSubjects,
    user: Columns<UserRow>,
    state: Columns<ThrottleRow>,
}

impl<'a> ReadLogin<'a> {
    fn new(name: &str, subjects: &'a LoginSubjects) -> Self {
        Self {
            name: name.to_ascii_lowercase(),
            subjects,
            user: columns::<UserRow>(),
            state: columns::<ThrottleRow>(),
        }
    }

    fn walk<'b>(&'b self, by: &str, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let LoginSubjects {
            at_home,
            nobody,
            from,
        } = self.subjects;
        out.push_sql("SELECT ");
        self.user.walk_ast(out.reborrow())?;
        out.push_sql(", users.password_hash, ");
        self.state.walk_ast(out.reborrow())?;
        out.push_sql(" FROM (SELECT users.*, ARRAY[coalesce(");
        out.push_bind_param::<Text, _>(&LoginSubjects::USER)?;
        out.push_sql(" || users.id, ");
        out.push_bind_param::<Text, _>(nobody)?;
        out.push_sql("), ");
        out.push_bind_param::<Text, _>(&LoginSubjects::USER)?;
        out.push_sql(" || users.id || ");
        out.push_bind_param::<Nullable<Text>, _>(at_home)?;
        out.push_sql(", ");
        out.push_bind_param::<Nullable<Text>, _>(from)?;
        out.push_sql("] AS subjects FROM (VALUES (1)) AS one LEFT JOIN users ON ");
        out.push_sql(by);
        out.push_sql(" = ");
        out.push_bind_param::<Text, _>(&self.name)?;
        // The names are put together once, not for each row that is compared with them.
        out.push_sql(
            " OFFSET 0) AS users
             LEFT JOIN login_throttle ON login_throttle.subject = ANY (users.subjects)",
        );
        Ok(())
    }
}

struct ByEmail<'a>(ReadLogin<'a>);

impl QueryFragment<Pg> for ByEmail<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        self.0.walk(LOWER_EMAIL, out)
    }
}

struct ByUsername<'a>(ReadLogin<'a>);

impl QueryFragment<Pg> for ByUsername<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        self.0.walk(LOWER_USERNAME, out)
    }
}

/// Marks the login of a user who is active and has the hash still, opens the session and writes it down;
/// returns both rows, or none.
///
/// The user's row is locked first: what changes factors waits, or has ended before the session is inserted.
struct OpenSession<'a> {
    new: &'a NewSession<'a>,
    address: Option<String>,
    checked_hash: &'a str,
    now: DateTime<Utc>,
    is_by_mfa: bool,
    event: NewAuditEvent<'a>,
    session: Columns<SessionRow>,
    user: Columns<UserRow>,
}

impl QueryFragment<Pg> for OpenSession<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let new = self.new;
        out.push_sql("WITH checked AS (UPDATE users SET last_login_at = ");
        out.push_bind_param::<Timestamptz, _>(&self.now)?;
        out.push_sql(", password_hash = coalesce(");
        out.push_bind_param::<Nullable<Text>, _>(&new.rehashed_password)?;
        out.push_sql(", password_hash) WHERE id = ");
        out.push_bind_param::<SqlUuid, _>(&new.user_id.0)?;
        out.push_sql(" AND password_hash = ");
        out.push_bind_param::<Text, _>(&self.checked_hash)?;
        out.push_sql(" AND is_active RETURNING ");
        self.user.walk_ast(out.reborrow())?;
        out.push_sql(
            "), opened AS (
                 INSERT INTO sessions (id, user_id, rotated_at, created_at, last_used_at,
                     idle_expires_at, absolute_expires_at, user_agent, address, mfa)
                 SELECT ",
        );
        out.push_bind_param::<SqlUuid, _>(&new.id.0)?;
        out.push_sql(", id, last_login_at, last_login_at, last_login_at, ");
        out.push_bind_param::<Timestamptz, _>(&new.idle_expires_at)?;
        out.push_sql(", ");
        out.push_bind_param::<Timestamptz, _>(&new.absolute_expires_at)?;
        out.push_sql(", ");
        out.push_bind_param::<Text, _>(&new.origin.user_agent)?;
        out.push_sql(", ");
        out.push_bind_param::<Nullable<Text>, _>(&self.address)?;
        out.push_sql(", ");
        out.push_bind_param::<Bool, _>(&self.is_by_mfa)?;
        out.push_sql(" FROM checked RETURNING ");
        self.session.walk_ast(out.reborrow())?;
        out.push_sql("), written AS (");
        self.event.walk_insert(out.reborrow())?;
        out.push_sql(" FROM opened) SELECT opened.*, checked.* FROM opened, checked");
        Ok(())
    }
}

prepared! {
    ByEmail<'a> => (Nullable<Types<UserRow>>, Nullable<Text>, Nullable<Types<ThrottleRow>>)
        = ByEmail<'static>;
    ByUsername<'a> => (Nullable<Types<UserRow>>, Nullable<Text>, Nullable<Types<ThrottleRow>>)
        = ByUsername<'static>;
    OpenSession<'a> => (Types<SessionRow>, Types<UserRow>) = OpenSession<'static>;
}
