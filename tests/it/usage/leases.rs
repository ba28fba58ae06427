//! Leases in Postgres: several replicas, what comes late, and what the dead leave.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use futures_util::future::join_all;
use tollkeeper::{
    model::{
        Answer, Ending, HoldId, Kind, MeterName, Operation, Period, ReplicaId, Tiers, Tokens,
        UserId,
    },
    store::{Operated, Store},
};

use super::quota::{use_tokens, with_tiers};
use crate::harness::{TestApp, cluster, eventually};

const TTL: Duration = Duration::from_mins(1);

/// A replica, as the store sees it.
struct Replica {
    id: ReplicaId,
    store: Store,
    tiers: Arc<Tiers>,
}

impl Replica {
    async fn start(app: &TestApp) -> Self {
        let replica = Self {
            id: ReplicaId::new(),
            store: Store::new(&app.settings().database).unwrap(),
            tiers: app.running().usage.tiers(),
        };
        replica
            .store
            .replica_register(replica.id, TTL)
            .await
            .unwrap();
        replica
    }

    async fn operate(&self, meter: &MeterName, operation: Operation) -> Option<Operated> {
        let operations = [(meter.clone(), operation)];
        let done = self
            .store
            .lease_operations(self.id, &operations, &self.tiers);
        Some(done.await.unwrap()?[0])
    }

    /// Asks for `need`, and if there is more for `want`; answers what is granted in all.
    async fn ask(&self, meter: &MeterName, number: u64, need: Tokens, want: Tokens) -> Tokens {
        let operation = Operation {
            need,
            want,
            ..nothing(number)
        };
        let answer = self.operate(meter, operation).await.unwrap().answer;
        answer.expect("the latest").granted
    }

    async fn beat(&self, ttl: Duration, holds: Duration) -> bool {
        let heard = self.store.replica_heartbeat(self.id, ttl, holds).await;
        heard.unwrap().is_some()
    }

    async fn reap(&self) -> usize {
        self.store.replica_reap(Duration::ZERO, 2).await.unwrap()
    }
}

fn nothing(number: u64) -> Operation {
    Operation {
        number,
        spent: 0,
        give_back: 0,
        need: 0,
        want: 0,
    }
}

/// A user's total of this month.
fn total(user: &str) -> MeterName {
    MeterName {
        user_id: user.parse::<UserId>().unwrap(),
        period: Period::containing(Utc::now()),
        model: None,
    }
}

/// Asserts that balances say what the leases add up to, and answers it for all meters.
async fn leased(app: &TestApp) -> i64 {
    let wrong = "SELECT count(*) FROM quota_balances AS b FULL JOIN (
            SELECT user_id, month, model, sum(granted)::bigint AS sum FROM quota_leases
            GROUP BY 1, 2, 3) AS l USING (user_id, month, model)
        WHERE coalesce(b.leased, -1) <> coalesce(l.sum, 0)";
    assert_eq!(app.count(wrong).await, 0, "balances that are wrong");
    app.count("SELECT coalesce(sum(leased), 0)::bigint FROM quota_balances")
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_fight_for_a_meter_get_all_of_it_and_never_more() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    let meter = total(&user);
    let fighters = (0..4_i64).map(async |n| {
        let replica = Replica::start(&app).await;
        let (mut granted, mut spent_in_all) = (0, 0);
        for number in 1.. {
            let need = 3 + n;
            let before = granted;
            // Every third turn half of the lease is used, then taken out.
            let spent = if number % 3 == 0 { granted / 2 } else { 0 };
            if spent > 0 {
                use_tokens(&app, &user, spent).await;
                spent_in_all += spent;
            }
            let operation = Operation {
                spent,
                need,
                want: 4 * need,
                ..nothing(number)
            };
            let done = replica.operate(&meter, operation).await.unwrap();
            let answer: Answer = done.answer.unwrap();
            granted = answer.granted;
            if granted > before - spent {
                // Something was given: then there was something, the use that others have booked and
                // not taken out yet counted twice.
                assert!(done.balance.committed + done.balance.leased <= 1000);
            } else if spent == 0 {
                break;
            }
        }
        (granted, spent_in_all)
    });
    let (granted, spent): (Vec<_>, Vec<_>) = join_all(fighters).await.into_iter().unzip();
    let (granted, spent): (i64, i64) = (granted.iter().sum(), spent.iter().sum());
    assert_eq!(leased(&app).await, granted);
    // Less is left than whoever was refused last needs.
    assert!(
        (995..=1000).contains(&(granted + spent)),
        "{granted} {spent}"
    );
    let last = Replica::start(&app).await;
    let left = 1000 - granted - spent;
    assert_eq!(last.ask(&meter, 1, left + 1, left + 1).await, 0);
    assert_eq!(last.ask(&meter, 2, left, left).await, left);
    assert_eq!(leased(&app).await + spent, 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_waited_for_a_shrink_sees_the_use_that_it_stands_for() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let meter = total(&user);
    let (owner, other) = (Replica::start(&app).await, Replica::start(&app).await);
    assert_eq!(owner.ask(&meter, 1, 100, 100).await, 100);
    let shrinking = cluster::connect(&app.database_url).await;
    shrinking
        .batch_execute(
            "BEGIN; UPDATE quota_balances SET leased = leased - 60 WHERE model = '';
             UPDATE quota_leases SET granted = granted - 60, operation = 2",
        )
        .await
        .unwrap();
    let asking = tokio::spawn(async move {
        let granted = other.ask(&meter, 1, 1, 60).await;
        (other, meter, granted)
    });
    let waiting = "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("the grant waits", async || app.count(waiting).await == 1).await;
    // Booked after the grant began to wait: what it had read before says nothing of it.
    use_tokens(&app, &user, 60).await;
    shrinking.batch_execute("COMMIT").await.unwrap();
    let (other, meter, granted) = asking.await.unwrap();
    assert_eq!(granted, 0, "40 leased and 60 used of 100");
    // The owner gives the rest back: that can be had.
    let back = Operation {
        give_back: 40,
        ..nothing(3)
    };
    owner.operate(&meter, back).await.unwrap();
    assert_eq!(other.ask(&meter, 2, 40, 40).await, 40);
    assert_eq!(leased(&app).await, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_happens_once_however_often_and_late_it_comes() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    let meter = total(&user);
    let replica = Replica::start(&app).await;
    let first = Operation {
        need: 10,
        want: 10,
        ..nothing(1)
    };
    let second = Operation {
        give_back: 4,
        need: 100,
        want: 100,
        ..nothing(2)
    };
    for _ in 0..3 {
        let done = replica.operate(&meter, first).await.unwrap();
        assert_eq!(done.answer.unwrap().granted, 10);
    }
    for _ in 0..3 {
        let done = replica.operate(&meter, second).await.unwrap();
        assert_eq!(done.answer.unwrap().granted, 106);
        assert_eq!(done.balance.leased, 106);
    }
    let late = replica.operate(&meter, first).await.unwrap();
    assert_eq!((late.answer, late.balance.leased), (None, 106));
    assert_eq!(leased(&app).await, 106);
    let number = "SELECT operation FROM quota_leases";
    assert_eq!(app.count(number).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_transaction_serves_many_users_and_models() {
    let (app, _tiers) = with_tiers().await;
    let mut operations = Vec::new();
    let mut expected = Vec::new();
    for (tier, model, granted) in [
        ("small", None, 100),
        ("small", None, 100),
        ("large", None, 150),
        ("large", Some("gpt-5"), 0),
        ("large", Some("a-model"), 150),
        ("none", None, 0),
        ("open", None, 150),
    ] {
        let user = app.user().tier(tier).create().await.id;
        let meter = MeterName {
            model: model.map(|name| name.parse().unwrap()),
            ..total(&user)
        };
        if granted == 0 && model.is_some() {
            let used = super::tokens(150);
            let event = super::UsageEvent {
                tokens: used,
                model: "gpt-5".to_owned(),
                ..super::event(&user)
            };
            app.record(&event).await.unwrap();
        }
        let need = if granted == 100 { 100 } else { 150 };
        let operation = Operation {
            need,
            want: need,
            ..nothing(1)
        };
        operations.push((meter, operation));
        expected.push(granted);
    }
    // Somebody who does not exist has nothing.
    let stranger = total(&UserId::new().to_string());
    let one = Operation {
        need: 1,
        want: 1,
        ..nothing(1)
    };
    operations.push((stranger, one));
    expected.push(0);
    let replica = Replica::start(&app).await;
    let done = replica
        .store
        .lease_operations(replica.id, &operations, &replica.tiers)
        .await
        .unwrap()
        .unwrap();
    let granted: Vec<_> = done
        .iter()
        .map(|done| done.answer.unwrap().granted)
        .collect();
    assert_eq!(granted, expected);
    assert_eq!(done[0].balance.limit, Some(100));
    assert_eq!(done[3].balance.committed, 150);
    assert_eq!(done[6].balance.limit, None);
    assert_eq!(leased(&app).await, granted.iter().sum::<i64>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_limit_counts_from_the_next_operation_on() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let meter = total(&user);
    let replica = Replica::start(&app).await;
    assert_eq!(replica.ask(&meter, 1, 101, 101).await, 0);
    app.sql("UPDATE users SET tier = 'large' WHERE tier = 'small'")
        .await;
    assert_eq!(replica.ask(&meter, 2, 700, 700).await, 700);
    app.sql("UPDATE users SET tier = 'small' WHERE tier = 'large'")
        .await;
    let done = replica.operate(&meter, nothing(3)).await.unwrap();
    // Nothing is clawed back, nothing is given.
    assert_eq!(done.answer.unwrap().remaining, Some(100 - 700));
    assert_eq!(replica.ask(&meter, 4, 1, 1).await, 700);
    let back = Operation {
        give_back: 690,
        ..nothing(5)
    };
    let done = replica.operate(&meter, back).await.unwrap();
    assert_eq!(done.answer.unwrap().remaining, Some(90));
    let base = "SELECT base_limit FROM quota_balances WHERE model = ''";
    assert_eq!(app.count(base).await, 100, "what was decided is noted");
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_of_the_dead_come_back_once_and_only_when_their_holds_are_over() {
    let (app, _tiers) = with_tiers().await;
    let survivor = Replica::start(&app).await;
    let dying = Replica::start(&app).await;
    for _ in 0..5 {
        let meter = total(&app.user().tier("small").create().await.id);
        assert_eq!(dying.ask(&meter, 1, 80, 80).await, 80);
        assert_eq!(survivor.ask(&meter, 1, 20, 20).await, 20);
    }
    let settled = [(HoldId(7), Ending::Released)];
    dying
        .store
        .settlement_tombstones(dying.id, &settled)
        .await
        .unwrap();
    assert_eq!(survivor.reap().await, 0, "both live");
    // Not heard of any more, but a hold of it lasts.
    let long_ago = "SET expires_at = now() - interval '1 second'";
    let dies = format!("UPDATE replicas {long_ago} WHERE id = '{}'", dying.id);
    assert!(dying.beat(TTL, TTL).await);
    app.sql(&dies).await;
    assert_eq!(survivor.reap().await, 0, "its hold lasts");
    let meter = total(&app.user().tier("small").create().await.id);
    assert!(dying.operate(&meter, nothing(2)).await.is_none());
    // It is heard of again in time: all is as it was.
    assert!(dying.beat(TTL, Duration::ZERO).await);
    assert_eq!(dying.ask(&meter, 2, 5, 5).await, 5);
    app.sql(&dies).await;
    app.sql(&format!(
        "UPDATE replicas SET holds_until = now() WHERE id = '{}'",
        dying.id
    ))
    .await;
    join_all((0..4).map(|_| survivor.reap())).await;
    assert_eq!(leased(&app).await, 5 * 20);
    assert!(!dying.beat(TTL, TTL).await, "nothing revives it");
    assert!(dying.operate(&meter, nothing(3)).await.is_none());
    // The survivor, and the server.
    assert_eq!(app.count("SELECT count(*) FROM replicas").await, 2);
    assert_eq!(app.count("SELECT count(*) FROM quota_settlements").await, 0);
    assert_eq!(survivor.ask(&meter, 2, 100, 100).await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_not_reaped_while_an_operation_of_it_is_under_way() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let meter = total(&user);
    let (survivor, slow) = (Replica::start(&app).await, Replica::start(&app).await);
    assert_eq!(slow.ask(&meter, 1, 10, 10).await, 10);
    let holder = cluster::connect(&app.database_url).await;
    holder
        .batch_execute("BEGIN; SELECT FROM quota_balances FOR UPDATE")
        .await
        .unwrap();
    let id = slow.id;
    let asking = tokio::spawn(async move { slow.ask(&meter, 2, 10, 10).await });
    let waiting = "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("it waits", async || app.count(waiting).await == 1).await;
    app.sql(&format!(
        "UPDATE replicas SET expires_at = now(), holds_until = now() WHERE id = '{id}'"
    ))
    .await;
    assert_eq!(survivor.reap().await, 0);
    holder.batch_execute("COMMIT").await.unwrap();
    assert_eq!(asking.await.unwrap(), 20);
    assert_eq!(survivor.reap().await, 1);
    assert_eq!(leased(&app).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_that_comes_late_takes_nothing_back() {
    let (app, _tiers) = with_tiers().await;
    let replica = Replica::start(&app).await;
    assert!(replica.beat(10 * TTL, 20 * TTL).await);
    let promised =
        "SELECT (extract(epoch FROM expires_at) + extract(epoch FROM holds_until))::bigint
        FROM replicas";
    let before = app.count(promised).await;
    assert!(replica.beat(TTL, TTL).await);
    assert_eq!(app.count(promised).await, before);
    let heard = replica.store.replica_heartbeat(replica.id, TTL, TTL).await;
    let heard = heard.unwrap().unwrap();
    assert_eq!(heard.replicas, 2, "the server is another");
    assert!((Utc::now() - heard.now).num_seconds().abs() < 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_settles_a_hold_first_decides_how_it_ended() {
    let (app, _tiers) = with_tiers().await;
    let replica = Replica::start(&app).await;
    let (store, id) = (&replica.store, replica.id);
    app.sql(&format!(
        "INSERT INTO quota_settlements (replica_id, hold_id, kind, tokens)
         VALUES ('{id}', 2, 'committed', 33)"
    ))
    .await;
    // The highest bit of a number is a bit like the others.
    let high = HoldId(u64::MAX);
    let said = [
        (HoldId(1), Ending::Expired),
        (HoldId(2), Ending::Released),
        (high, Ending::Released),
    ];
    for _ in 0..2 {
        let mut kinds = store.settlement_tombstones(id, &said).await.unwrap();
        kinds.sort_by_key(|(hold, _)| *hold);
        let expected = [
            (HoldId(1), Kind::Ended(Ending::Expired)),
            (HoldId(2), Kind::Committed(33)),
            (high, Kind::Ended(Ending::Released)),
        ];
        assert_eq!(kinds, expected);
    }
    let mut listed = Vec::new();
    let mut after = None;
    loop {
        let page = store.settlement_list(id, after, 2).await.unwrap();
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        listed.extend(page);
    }
    assert_eq!(listed.len(), 3);
    let holds: Vec<_> = listed.iter().map(|(hold, _)| *hold).collect();
    store.settlement_delete(id, &holds[..2]).await.unwrap();
    let left = store.settlement_list(id, None, 10).await.unwrap();
    assert_eq!(left, listed[2..]);
    // Of others, there is nothing.
    let stranger = ReplicaId::new();
    assert!(
        store
            .settlement_list(stranger, None, 10)
            .await
            .unwrap()
            .is_empty()
    );
    store.settlement_tombstones(stranger, &said).await.unwrap();
    store.lease_sweep(100).await.unwrap();
    assert_eq!(
        app.count("SELECT count(*) FROM quota_settlements").await,
        1,
        "nobody reads what is told to a replica that is gone"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_that_are_empty_are_forgotten_after_a_while() {
    let (app, _tiers) = with_tiers().await;
    let replica = Replica::start(&app).await;
    let mut meters = Vec::new();
    for granted in [0, 0, 9] {
        let meter = total(&app.user().tier("small").create().await.id);
        assert_eq!(replica.ask(&meter, 5, granted, granted).await, granted);
        meters.push(meter);
    }
    replica.store.lease_sweep(100).await.unwrap();
    assert_eq!(app.count("SELECT count(*) FROM quota_leases").await, 3);
    app.sql("UPDATE quota_leases SET operated_at = now() - interval '1 hour'")
        .await;
    replica.store.lease_sweep(100).await.unwrap();
    assert_eq!(app.count("SELECT count(*) FROM quota_leases").await, 1);
    assert_eq!(replica.ask(&meters[0], 6, 3, 3).await, 3);
    assert_eq!(leased(&app).await, 12);
}
