//! Refresh tokens: derived from the session and its generation, never stored.

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Lifetimes, MasterKey};
use crate::model::{RefreshRefusal, RefreshStep, SessionId, SessionStanding};

const PREFIX: &str = "tkr_";
const PAYLOAD_BYTES: usize = 16 + 8;
const MAC_BYTES: usize = 32;

/// Makes and reads refresh tokens: `tkr_` and base64url of session, generation and their HMAC.
pub(super) struct RefreshTokens {
    key: hmac::Key,
}

impl RefreshTokens {
    pub(super) fn new(master_key: &MasterKey) -> Self {
        Self {
            key: master_key.mac_key("refresh-token/v1"),
        }
    }

    /// The one token of this generation: deriving it again gives the same.
    pub(super) fn derive(&self, session: SessionId, counter: i64) -> String {
        let mut bytes = Vec::with_capacity(PAYLOAD_BYTES + MAC_BYTES);
        bytes.extend(session.0.as_bytes());
        bytes.extend(counter.to_be_bytes());
        let mac = hmac::sign(&self.key, &bytes);
        bytes.extend(mac.as_ref());
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The session and generation of a token of ours; `None` for anything else.
    pub(super) fn read(&self, token: &str) -> Option<(SessionId, i64)> {
        let bytes = URL_SAFE_NO_PAD.decode(token.strip_prefix(PREFIX)?).ok()?;
        let (payload, mac) = bytes.split_at_checked(PAYLOAD_BYTES)?;
        hmac::verify(&self.key, payload, mac).ok()?;
        let (session, counter) = payload.split_first_chunk::<16>()?;
        Some((
            SessionId(Uuid::from_bytes(*session)),
            i64::from_be_bytes(counter.try_into().ok()?),
        ))
    }
}

/// Decides what presenting generation `presented` does to a session.
///
/// Generations are compared, not times: the newest advances, the one before repeats its successor
/// while that is unused (had it been used, there would be a newer one) and the retry window lasts,
/// and anything older is a replay (RFC 9700 §4.14.2).
pub(super) fn decide(
    standing: &SessionStanding,
    presented: i64,
    lifetimes: &Lifetimes,
    now: DateTime<Utc>,
) -> RefreshStep {
    let SessionStanding { session, user } = standing;
    if !session.is_live(now) {
        return RefreshStep::Refuse(RefreshRefusal::SessionEnded);
    }
    let generations_back = match session.counter.checked_sub(presented) {
        // A generation of the future: the database was set back. Nobody is to blame.
        None | Some(..0) => return RefreshStep::Refuse(RefreshRefusal::Unknown),
        Some(back) => back,
    };
    let retry_ends = session.rotated_at + lifetimes.refresh_retry_window;
    if generations_back > 1 || (generations_back == 1 && now >= retry_ends) {
        return RefreshStep::Revoke;
    }
    if !user.is_active {
        return RefreshStep::Refuse(RefreshRefusal::AccountDisabled);
    }
    if generations_back == 1 {
        return RefreshStep::Repeat;
    }
    if now >= session.idle_expires_at {
        return RefreshStep::Refuse(RefreshRefusal::Expired);
    }
    let idle_expires_at = (now + lifetimes.refresh_idle).min(session.absolute_expires_at);
    RefreshStep::Advance { idle_expires_at }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{Role, Session, User, UserId};

    const LIFETIMES: Lifetimes = Lifetimes {
        refresh_idle: Duration::from_secs(7 * 86_400),
        refresh_absolute: Duration::from_secs(30 * 86_400),
        refresh_retry_window: Duration::from_secs(120),
    };

    fn start() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).expect("valid")
    }

    fn fresh() -> SessionStanding {
        let (user_id, now) = (UserId::new(), start());
        SessionStanding {
            session: Session {
                id: SessionId::new(),
                user_id,
                counter: 0,
                rotated_at: now,
                idle_expires_at: now + LIFETIMES.refresh_idle,
                absolute_expires_at: now + LIFETIMES.refresh_absolute,
                revoked_at: None,
                mfa: false,
            },
            user: User {
                id: user_id,
                email: "a@example.com".parse().expect("valid"),
                username: "alice".parse().expect("valid"),
                full_name: "".parse().expect("valid"),
                role: Role::User,
                tier: "free".parse().expect("valid"),
                tier_updated_at: now,
                is_active: true,
                auth_epoch: 0,
                email_verified_at: None,
                created_at: now,
                updated_at: now,
                last_login_at: None,
                mfa_enabled: false,
            },
        }
    }

    /// Does to the session what the store does.
    fn present(standing: &mut SessionStanding, counter: i64, now: DateTime<Utc>) -> RefreshStep {
        let step = decide(standing, counter, &LIFETIMES, now);
        match step {
            RefreshStep::Advance { idle_expires_at } => {
                standing.session.counter += 1;
                standing.session.rotated_at = now;
                standing.session.idle_expires_at = idle_expires_at;
            }
            RefreshStep::Revoke => standing.session.revoked_at = Some(now),
            RefreshStep::Repeat | RefreshStep::Refuse(_) => {}
        }
        step
    }

    #[test]
    fn a_lost_answer_can_be_retried_until_its_successor_is_used() {
        let mut standing = fresh();
        assert!(matches!(
            present(&mut standing, 0, start()),
            RefreshStep::Advance { .. }
        ));
        assert_eq!(
            present(&mut standing, 0, start() + Duration::from_secs(119)),
            RefreshStep::Repeat
        );
        assert!(matches!(
            present(&mut standing, 1, start()),
            RefreshStep::Advance { .. }
        ));
        assert_eq!(present(&mut standing, 0, start()), RefreshStep::Revoke);
        assert_eq!(
            present(&mut standing, 2, start()),
            RefreshStep::Refuse(RefreshRefusal::SessionEnded)
        );
    }

    #[test]
    fn the_retry_window_ends() {
        let mut standing = fresh();
        present(&mut standing, 0, start());
        let late = start() + LIFETIMES.refresh_retry_window;
        assert_eq!(present(&mut standing, 0, late), RefreshStep::Revoke);
    }

    #[test]
    fn idle_and_absolute_expiry_hold() {
        let mut standing = fresh();
        let idle = standing.session.idle_expires_at;
        assert_eq!(
            present(&mut standing, 0, idle),
            RefreshStep::Refuse(RefreshRefusal::Expired)
        );
        let mut now = start();
        while now < standing.session.absolute_expires_at {
            let counter = standing.session.counter;
            assert!(matches!(
                present(&mut standing, counter, now),
                RefreshStep::Advance { .. }
            ));
            assert!(standing.session.idle_expires_at <= standing.session.absolute_expires_at);
            now += Duration::from_secs(6 * 86_400);
        }
        let counter = standing.session.counter;
        assert_eq!(
            present(&mut standing, counter, now),
            RefreshStep::Refuse(RefreshRefusal::SessionEnded)
        );
    }

    #[test]
    fn a_disabled_account_gets_nothing_and_keeps_its_session() {
        let mut standing = fresh();
        standing.user.is_active = false;
        assert_eq!(
            present(&mut standing, 0, start()),
            RefreshStep::Refuse(RefreshRefusal::AccountDisabled)
        );
        standing.user.is_active = true;
        assert!(matches!(
            present(&mut standing, 0, start()),
            RefreshStep::Advance { .. }
        ));
    }

    proptest! {
        /// Whatever is presented in whatever order: there is one newest generation, only it or its
        /// predecessor is answered, and a session that ended stays so.
        #[test]
        fn sessions_never_fork(steps in prop::collection::vec((0_i64..6, 0_u64..200), 1..60)) {
            let mut standing = fresh();
            let mut now = start();
            for (presented, wait) in steps {
                now += Duration::from_secs(wait);
                let before = standing.session.clone();
                match present(&mut standing, presented, now) {
                    RefreshStep::Advance { .. } => {
                        prop_assert_eq!(presented, before.counter);
                        prop_assert_eq!(standing.session.counter, before.counter + 1);
                    }
                    RefreshStep::Repeat => prop_assert_eq!(presented, before.counter - 1),
                    RefreshStep::Revoke => prop_assert!(presented < before.counter),
                    RefreshStep::Refuse(_) => {}
                }
                prop_assert!(before.revoked_at.is_none() || standing.session == before);
            }
        }

        #[test]
        fn only_our_own_tokens_are_read(counter in 0_i64.., flip in 0_usize..75, noise in any::<String>()) {
            let tokens = RefreshTokens::new(&MasterKey::new(&[7; 32]));
            let session = SessionId::new();
            let token = tokens.derive(session, counter);
            prop_assert_eq!(tokens.read(&token), Some((session, counter)));
            let mut altered = token.clone().into_bytes();
            let at = PREFIX.len() + flip;
            altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
            let altered = String::from_utf8(altered).expect("ASCII");
            prop_assert_ne!(tokens.read(&altered), Some((session, counter)));
            prop_assert_eq!(tokens.read(&noise), None);
            let others = RefreshTokens::new(&MasterKey::new(&[8; 32]));
            prop_assert_eq!(others.read(&token), None);
        }
    }
}
