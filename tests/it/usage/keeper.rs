//! Keepers of leases, two and more on one database.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use chrono::Utc;
use futures_util::future::join_all;
use tokio::{task::JoinHandle, time::Instant};
use tollkeeper::{
    config::QuotaSettings,
    model::{HoldName, MeterName, ModelName, Period, ReplicaId, TierName, Tiers, UserId},
    store::Store,
    usage::{
        Holding, Keeper, KeeperSettings, Reservation, Wish,
        lease::{Ended, Mode, Outcome, Refusal, RequestKey},
    },
};
use uuid::Uuid;

use super::quota::{use_tokens, with_tiers};
use crate::harness::{Blocker, TestApp, eventually};

const LEASED: &str = "SELECT coalesce(sum(leased), 0)::bigint FROM quota_balances";
const SETTLEMENTS: &str = "SELECT count(*) FROM quota_settlements";

/// A replica. Dropped, it is dead.
struct Replica {
    keeper: Keeper,
    run: JoinHandle<()>,
    tiers: Arc<Tiers>,
    /// How long its holds are to last.
    lasts: Duration,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.run.abort();
    }
}

/// As long as a test, or longer.
const LONG: Duration = Duration::from_mins(2);

/// Patient with a busy machine.
fn settings() -> KeeperSettings {
    KeeperSettings {
        ttl: Duration::from_secs(4),
        heartbeat: Duration::from_millis(200),
        hold: LONG,
        margin: Duration::from_millis(100),
        recall_bound: Duration::from_secs(5),
        ..KeeperSettings::from(&QuotaSettings::default())
    }
}

/// Quick to be forgotten.
fn brief() -> KeeperSettings {
    KeeperSettings {
        hold: Duration::from_secs(3),
        ..settings()
    }
}

impl Replica {
    async fn start(app: &TestApp) -> Self {
        Self::start_with(app, settings()).await
    }

    async fn start_with(app: &TestApp, settings: KeeperSettings) -> Self {
        let store = Store::new(&app.settings().database).unwrap();
        let tiers = app.running().usage.tiers();
        let keeper = Keeper::new(store, Arc::new(ArcSwap::new(tiers.clone())), settings);
        let run = tokio::spawn(keeper.clone().run());
        let lasts = settings.hold;
        let replica = Self {
            keeper,
            run,
            tiers,
            lasts,
        };
        // Heard of, it can be asked.
        eventually("it is heard of", async || {
            let user = UserId::new().to_string();
            replica.ask(&user, "none", 0).await != Reservation::Refused(Refusal::Fenced)
        })
        .await;
        replica
    }

    async fn ask(&self, user: &str, tier: &str, tokens: i64) -> Reservation {
        self.ask_for(user, tier, tokens, Mode::AllOrNothing, self.lasts)
            .await
    }

    async fn ask_for(
        &self,
        user: &str,
        tier: &str,
        tokens: i64,
        mode: Mode,
        lasts: Duration,
    ) -> Reservation {
        let tier: TierName = tier.parse().unwrap();
        let model: ModelName = "gpt-x".parse().unwrap();
        let wish = Wish {
            user_id: user.parse().unwrap(),
            limits: self.tiers.limits_of(&tier),
            model: Some(&model),
            request: RequestKey(Uuid::now_v7().as_u128()),
            tokens,
            mode,
            lasts,
            is_request: true,
        };
        self.keeper.reserve(&wish).await
    }

    async fn hold(&self, user: &str, tier: &str, tokens: i64) -> Holding {
        match self.ask(user, tier, tokens).await {
            Reservation::Held(holding) => holding,
            other => panic!("{tokens}: {other:?}"),
        }
    }
}

fn name_of(held: &Holding) -> HoldName {
    HoldName {
        owner: held.owner,
        hold: held.held.id,
    }
}

fn total(user: &str) -> MeterName {
    MeterName {
        user_id: user.parse().unwrap(),
        period: Period::containing(Utc::now()),
        model: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_replica_has_idle_another_gets() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    let (first, second) = (Replica::start(&app).await, Replica::start(&app).await);
    first.hold(&user, "large", 10).await;
    assert!(app.count(LEASED).await > 10, "it took more than it needed");
    let began = Instant::now();
    second.hold(&user, "large", 990).await;
    println!("recalled within {:?}", began.elapsed());
    let Reservation::Denied(standings) = first.ask(&user, "large", 1).await else {
        panic!("beyond the limit");
    };
    assert_eq!(standings[0].0, total(&user));
    assert_eq!(standings[0].1.limit, Some(1000));
    assert_eq!(app.count(LEASED).await, 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_of_two_replicas_get_what_there_is_and_never_more() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let replicas = [Replica::start(&app).await, Replica::start(&app).await];
    let asked = (0..60).map(|n| replicas[n % 2].ask(&user, "small", 3 + n as i64 % 5));
    let mut held = 0;
    for reservation in join_all(asked).await {
        match reservation {
            Reservation::Held(holding) => held += holding.held.tokens,
            Reservation::Denied(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(held <= 100 && held > 60, "{held}");
    // What is left can be had, by either; and then there is nothing.
    if held < 100 {
        replicas[1].hold(&user, "small", 100 - held).await;
    }
    for replica in &replicas {
        let denied = replica.ask(&user, "small", 1).await;
        assert!(matches!(denied, Reservation::Denied(_)), "{denied:?}");
    }
    assert_eq!(app.count(LEASED).await, 100);
}

/// On one thread: what was leased is on its way back before whoever waits for it looks again.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn limits_that_are_put_in_doubt_while_a_lease_comes_deny_nobody() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let replica = Arc::new(Replica::start(&app).await);
    // Nothing else is under way.
    let other = app.user().tier("large").create().await.id;
    replica.hold(&other, "large", 10).await;
    let first = Blocker::lock(&app, "quota_balances").await;
    let asking = tokio::spawn({
        let replica = replica.clone();
        async move { replica.ask(&user, "small", 60).await }
    });
    first.hold_up(&app, 1).await;
    // Waits behind the operation that brings the lease, and before the one that gives it back.
    let second = Blocker::lock(&app, "quota_balances");
    let doubt = async {
        first.hold_up(&app, 2).await;
        replica.keeper.all_limits_changed();
        first.release().await;
    };
    let (second, ()) = tokio::join!(second, doubt);
    second.hold_up(&app, 1).await;
    // Heartbeats wake whoever waits.
    tokio::time::sleep(3 * settings().heartbeat).await;
    second.release().await;
    let asked = asking.await.unwrap();
    assert!(matches!(asked, Reservation::Held(_)), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn best_effort_takes_what_is_left() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let replica = Replica::start(&app).await;
    replica.hold(&user, "small", 70).await;
    let lasts = Duration::from_secs(1);
    let took = replica
        .ask_for(&user, "small", 50, Mode::BestEffort, lasts)
        .await;
    let Reservation::Held(took) = took else {
        panic!("{took:?}");
    };
    assert_eq!(took.held.tokens, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_replica_had_comes_back_after_its_quarantine() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let dying = Replica::start_with(&app, brief()).await;
    let survivor = Replica::start(&app).await;
    let hold = dying.hold(&user, "small", 80).await;
    drop(dying);
    eventually("it is reaped", async || {
        matches!(
            survivor.ask(&user, "small", 100).await,
            Reservation::Held(_)
        )
    })
    .await;
    assert!(
        Utc::now() > hold.expires_at,
        "not while its hold may be committed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn released_and_expired_tokens_are_free_again_and_nothing_is_left_over() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let first = Replica::start_with(&app, brief()).await;
    let second = Replica::start_with(&app, brief()).await;
    let held = first.hold(&user, "small", 60).await;
    let name = name_of(&held);
    assert_eq!(first.keeper.release(name), Ended::Now);
    let owner = ReplicaId::new();
    let stranger = HoldName { owner, ..name };
    assert_eq!(first.keeper.release(stranger), Ended::Unknown);
    second.hold(&user, "small", 100).await;
    // That one expires.
    eventually("it is free", async || {
        matches!(first.ask(&user, "small", 100).await, Reservation::Held(_))
    })
    .await;
    // A third, released elsewhere: the owner learns it.
    let user = app.user().tier("small").create().await.id;
    let held = first.hold(&user, "small", 100).await;
    let settlement = format!(
        "INSERT INTO quota_settlements VALUES ('{}', {}, 'released', 0)",
        held.owner,
        held.held.id.0.cast_signed()
    );
    app.sql(&settlement).await;
    second.hold(&user, "small", 100).await;
    eventually("all is forgotten", async || {
        app.count(SETTLEMENTS).await == 0
    })
    .await;
    eventually("all is given back", async || {
        for replica in [&first, &second] {
            replica.keeper.give_back(Duration::from_secs(5)).await;
        }
        app.count(LEASED).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_turns_what_was_held_into_use() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let (first, second) = (Replica::start(&app).await, Replica::start(&app).await);
    let held = first.hold(&user, "small", 60).await;
    let name = name_of(&held);
    first.keeper.begin_commit(name);
    use_tokens(&app, &user, 25).await;
    let outcome = Outcome::Booked {
        actual: 25,
        new: true,
    };
    let meters = [total(&user)];
    assert_eq!(first.keeper.end_commit(name, &meters, outcome), Ended::Now);
    second.hold(&user, "small", 75).await;
    let denied = second.ask(&user, "small", 1).await;
    assert!(matches!(denied, Reservation::Denied(_)), "{denied:?}");
    let known = second.keeper.standing(&total(&user)).unwrap();
    assert_eq!(
        (known.limit, known.committed, known.held),
        (Some(100), 25, 75)
    );
    // Another hold of the same name there never was.
    let ended = first.keeper.release(name);
    assert_eq!(ended, Ended::Unknown);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_not_heard_of_admits_nothing_until_it_is() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("open").create().await.id;
    let settings = KeeperSettings {
        ttl: Duration::from_secs(2),
        recall_bound: Duration::from_millis(200),
        ..settings()
    };
    let replica = Replica::start_with(&app, settings).await;
    eventually("it has a lease", async || {
        matches!(replica.ask(&user, "open", 1).await, Reservation::Held(_))
    })
    .await;
    let blocker = Blocker::lock(&app, "replicas").await;
    // From its lease, for a while.
    eventually("it is fenced", async || {
        replica.ask(&user, "open", 1).await == Reservation::Refused(Refusal::Fenced)
    })
    .await;
    blocker.release().await;
    eventually("it is heard of", async || {
        matches!(replica.ask(&user, "open", 1).await, Reservation::Held(_))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_longer_than_usual_is_told_to_postgres_first() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let replica = Replica::start(&app).await;
    let lasts = Duration::from_mins(20);
    let held = replica
        .ask_for(&user, "small", 10, Mode::AllOrNothing, lasts)
        .await;
    let Reservation::Held(held) = held else {
        panic!("{held:?}");
    };
    let until = "SELECT extract(epoch FROM max(holds_until))::bigint FROM replicas";
    assert!(app.count(until).await >= held.expires_at.timestamp());
    assert!((held.expires_at - Utc::now()).num_minutes() >= 19);
}
