//! Leaf types that every room may name: ids, people, tiers, periods, usage.
//!
//! Values here are valid by construction: parsing is the only way in from outside. This room knows
//! no database, no protocol and no clock.

mod api_key;
mod audit;
mod change;
mod count;
mod erasure;
mod ids;
mod import;
mod lease;
mod limit;
mod mail;
mod mfa;
mod names;
mod notice;
mod page;
mod period;
mod quota;
mod revision;
mod scope;
mod service_account;
mod session;
mod throttle;
mod usage;
mod usage_reads;
mod user;

pub use api_key::{ApiKey, ApiKeyScopes, ApiKeyStanding};
pub use audit::{
    ActionFilter, Actor, ActorKind, AuditAction, AuditCursor, AuditEvent, AuditFilter, AuditRecord,
    Origin,
};
pub use change::Change;
pub use count::{Count, PerThread};
pub use erasure::ErasureStep;
pub use ids::{
    ApiKeyId, CreditId, EventId, FactorId, GrantRequestId, OneTimeTokenId, ReplicaId,
    ServiceAccountId, ServiceKeyId, SessionId, UserId,
};
pub use import::{ImportKey, ImportSource, ImportStanding, ImportStep, ImportUser};
pub use lease::{
    Answer, Balance, Carried, Ending, HoldId, HoldName, Kind, LeaseRow, MeterName, Operation,
    ReplicaRow, Tokens, operate,
};
pub use limit::{
    BaseSource, Credit, CreditShare, Draw, EffectiveLimit, LimitFacts, MonthlyOverride, PastMonth,
};
pub use mail::{MailDetails, MailKind, MailNote, MailedToken, TokenPurpose};
pub use mfa::{
    Factor, MfaCode, MfaStanding, RecoveryCode, TotpCode, TotpCredential, UsedCode, UsedFactor,
};
pub use names::{
    ApiKeyName, Email, FullName, Identifier, ModelName, NamePrefix, RequestId, ServiceName,
    TierName, Username,
};
pub use notice::QuotaNotice;
pub use page::{Cursor, Page, PageRequest};
pub use period::Period;
pub use quota::{
    CreditGrant, NewCredit, OnOutage, QuotaExceeded, QuotaStanding, QuotaState, TierLimits, Tiers,
};
pub use revision::{MinFreshness, Revision};
pub use scope::{Scope, ScopeSet};
pub use service_account::{KeyOverlap, ServiceAccount};
pub use session::{RefreshRefusal, RefreshStep, Session, SessionDetails, SessionStanding};
pub use throttle::{ThrottleCharge, ThrottleRule, ThrottleState};
pub use usage::{
    Booking, BookingOrigin, Labels, ModelUsage, MonthlyUsage, TokenCounts, UsageCursor, UsageEvent,
    UsageRecord, UsageTotals,
};
pub use usage_reads::{
    Interval, ReportBy, ReportLine, TimeRange, UsageCell, UsageCells, UsageFilter, UsageGroup,
    UsageGrouping, UsageSource,
};
pub use user::{Person, Role, User, UserChanges, UserFilter, UserStanding};

/// What is wrong with a value, as a sentence that ends an error message: "must be …".
pub type Violation = std::borrow::Cow<'static, str>;
