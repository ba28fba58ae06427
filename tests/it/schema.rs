//! The migrations, what the code believes of the schema, and the monthly partitions.

use std::collections::BTreeSet;

use chrono::Utc;
use futures_util::future::join_all;
use tokio_postgres::Client;
use tollkeeper::{
    config::Settings,
    model::Period,
    proto::tollkeeper::admin::v1::GrantCreditsRequest,
    store::{Migrator, migration_status},
};
use uuid::Uuid;

use crate::{
    harness::{RunningServer, TestApp, cluster},
    usage::event,
};

/// Everything in schema `public` that a migration can make, one line each.
const CATALOG: [&str; 7] = [
    "SELECT format('relation %s %s %s %s %s', relname, relkind, relpersistence, reloptions,
            pg_get_partkeydef(oid))
     FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind NOT IN ('i', 'I')",
    "SELECT format('column %s.%s %s %s %s %s %s %s', attrelid::regclass, attname,
            format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid),
            attcollation::regcollation, attidentity, attgenerated)
     FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
     LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
     WHERE relnamespace = 'public'::regnamespace AND relkind NOT IN ('i', 'I')
         AND attnum > 0 AND NOT attisdropped",
    "SELECT format('index %s %s', indexdef, tablename)
     FROM pg_indexes WHERE schemaname = 'public'",
    "SELECT format('constraint %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
     FROM pg_constraint WHERE connamespace = 'public'::regnamespace",
    "SELECT format('statistics %s %s', stxrelid::regclass, pg_get_statisticsobjdef(oid))
     FROM pg_statistic_ext WHERE stxnamespace = 'public'::regnamespace",
    "SELECT format('type %s %s', typname, typtype)
     FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd', 'r')",
    "SELECT format('function %s', pg_get_functiondef(oid))
     FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prokind IN ('f', 'p')",
];

const TABLES: &str = "
    SELECT relname::text FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
        AND relname NOT LIKE '\\_\\_diesel%'
    ORDER BY relname";

const SCHEMA_RS: &str = include_str!("../../src/store/schema.rs");

#[tokio::test(flavor = "multi_thread")]
async fn migrating_up_again_after_down_makes_the_same_schema() {
    let url = cluster::empty_database().await;
    let untouched = catalog(&url).await;
    let mut migrator = Migrator::connect(&url).await.unwrap();
    let names = migrator.up().unwrap();
    let before = catalog(&url).await;
    let reverted = down(&mut migrator);
    assert!(reverted.iter().eq(names.iter().rev()), "{reverted:?}");
    let left: Vec<_> = catalog(&url)
        .await
        .into_iter()
        .filter(|line| !line.contains("__diesel_schema_migrations"))
        .collect();
    assert_eq!(left, Vec::from_iter(untouched), "nothing is left");
    assert_eq!(migrator.up().unwrap(), names);
    let after = catalog(&url).await;
    assert!(before.len() > 100, "the catalog shows the schema");
    assert_eq!(before, after);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_migration_goes_down_to_what_was_there_before_it() {
    let url = cluster::empty_database().await;
    let mut migrator = Migrator::connect(&url).await.unwrap();
    migrator.up().unwrap();
    // Down by n, up again, for every n: a later migration may hide what an earlier one leaves.
    let whole = catalog(&url).await;
    let count = migration_status(&url).await.unwrap().len();
    for steps in 1..=count {
        for _ in 0..steps {
            migrator.down().unwrap().unwrap();
        }
        let applied = migrator.up().unwrap();
        assert_eq!(applied.len(), steps);
        assert_eq!(catalog(&url).await, whole, "down by {steps}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_in_use_can_be_migrated_down_and_up_again() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.login(&user).await;
    app.record(&event(&user.id)).await.unwrap();
    let credits = GrantCreditsRequest {
        user_id: user.id,
        tokens: 5,
        request_id: Uuid::now_v7().to_string(),
        ..GrantCreditsRequest::default()
    };
    let mut admin = app.admin(&app.service_key);
    admin.grant_credits(credits).await.unwrap();
    let url = app.database_url.clone();
    app.stop().await.unwrap();
    let mut migrator = Migrator::connect(&url).await.unwrap();
    for steps in 1..=5 {
        for _ in 0..steps {
            migrator.down().unwrap().unwrap();
        }
        assert_eq!(migrator.up().unwrap().len(), steps);
    }
    down(&mut migrator);
    assert_eq!(
        lines(&cluster::connect(&url).await, TABLES).await,
        Vec::<String>::new()
    );
    assert!(migrator.down().unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_code_knows_the_schema_as_it_is() {
    let app = TestApp::spawn().await;
    let client = cluster::connect(&app.database_url).await;
    let mut tables = String::new();
    for table in lines(&client, TABLES).await {
        let keys = format!(
            "SELECT column_name::text FROM information_schema.table_constraints AS c
             JOIN information_schema.key_column_usage AS k USING (constraint_name, table_name)
             WHERE c.table_name = '{table}' AND c.constraint_type = 'PRIMARY KEY'
             ORDER BY k.ordinal_position"
        );
        let keys = lines(&client, &keys).await;
        let columns = format!(
            "SELECT column_name::text, udt_name::text, is_nullable = 'YES'
             FROM information_schema.columns WHERE table_name = '{table}' ORDER BY ordinal_position"
        );
        tables.push_str(&format!(
            "diesel::table! {{\n    {table} ({}) {{\n",
            keys.join(", ")
        ));
        for row in client.query(&columns, &[]).await.unwrap() {
            let column: String = row.get(0);
            let nullable: bool = row.get(2);
            let mut kind = diesel_type(row.get(1));
            if nullable {
                kind = format!("Nullable<{kind}>");
            }
            tables.push_str(&format!("        {column} -> {kind},\n"));
        }
        tables.push_str("    }\n}\n\n");
    }
    let start = SCHEMA_RS.find("diesel::table!").unwrap();
    let end = SCHEMA_RS.find("diesel::joinable!").unwrap();
    assert_eq!(SCHEMA_RS[start..end], tables);
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_of_the_months_around_exist_after_the_start() {
    let app = TestApp::spawn().await;
    let now = Period::containing(Utc::now());
    let months = [now.previous().previous(), now.previous()]
        .into_iter()
        .chain((0..=3).map(|n| now.plus_months(n)));
    let expected: BTreeSet<String> = months
        .flat_map(|month| {
            let suffix = month.to_string().replace('-', "_");
            ["usage_records", "audit_events"].map(|table| format!("{table}_{suffix}"))
        })
        .chain(["usage_records_default", "audit_events_default"].map(str::to_owned))
        .collect();
    assert_eq!(partitions(&app.database_url).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_land_in_the_partition_of_their_month() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    let suffix = Period::containing(Utc::now()).to_string().replace('-', "_");
    let usage = format!("SELECT count(*) FROM usage_records_{suffix}");
    assert_eq!(app.count(&usage).await, 1);
    let audit = format!("SELECT count(*) FROM audit_events_{suffix}");
    assert!(app.count(&audit).await > 0, "creating a user is an act");
    for table in ["usage_records_default", "audit_events_default"] {
        let stray = format!("SELECT count(*) FROM {table}");
        assert_eq!(app.count(&stray).await, 0, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_together_make_each_partition_once() {
    let app = TestApp::spawn().await;
    let before = partitions(&app.database_url).await;
    let names = Vec::from_iter(before.iter().filter(|name| !name.ends_with("default")));
    for name in names {
        app.sql(&format!("DROP TABLE {name}")).await;
    }
    let replicas = join_all((0..4).map(|_| app.replica())).await;
    assert_eq!(replicas.len(), 4);
    assert_eq!(partitions(&app.database_url).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_servers_started_at_once_on_an_empty_database_all_come_up() {
    let url = cluster::empty_database().await;
    let mut settings = Settings {
        dev: true,
        ..Settings::default()
    };
    settings.server.listen.set_port(0);
    settings.ops.listen = None;
    settings.database.url = tollkeeper::config::Secret::new(url.clone());
    settings.database.pool_size = 2;
    let keys = tempfile::tempdir().unwrap();
    keys.path().clone_into(&mut settings.auth.key_dir);
    let started = join_all((0..10).map(|_| RunningServer::start(&settings))).await;
    for server in started {
        server.expect("came up").stop().await.unwrap();
    }
    let status = migration_status(&url).await.unwrap();
    assert!(status.iter().all(|known| known.applied), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrators_take_turns_on_an_empty_database() {
    let url = cluster::empty_database().await;
    let migrators = (0..10).map(|_| {
        let url = url.clone();
        tokio::spawn(async move { Migrator::connect(&url).await?.up() })
    });
    let outcomes = join_all(migrators).await;
    let outcomes: Vec<Vec<String>> = outcomes
        .into_iter()
        .map(|outcome| outcome.unwrap().unwrap())
        .collect();
    let workers = outcomes.iter().filter(|applied| !applied.is_empty());
    assert_eq!(workers.count(), 1, "{outcomes:?}");
}

/// Reverts every migration; returns their names.
fn down(migrator: &mut Migrator) -> Vec<String> {
    std::iter::from_fn(|| migrator.down().unwrap()).collect()
}

/// The first column of what a statement answers.
async fn lines(client: &Client, statement: &str) -> Vec<String> {
    let rows = client.query(statement, &[]).await.expect(statement);
    rows.iter().map(|row| row.get(0)).collect()
}

async fn catalog(url: &str) -> BTreeSet<String> {
    let client = cluster::connect(url).await;
    let mut all = BTreeSet::new();
    for statement in CATALOG {
        all.extend(lines(&client, statement).await);
    }
    all
}

async fn partitions(url: &str) -> BTreeSet<String> {
    let statement = "SELECT inhrelid::regclass::text FROM pg_inherits
         JOIN pg_class ON pg_class.oid = inhrelid WHERE relkind = 'r'";
    BTreeSet::from_iter(lines(&cluster::connect(url).await, statement).await)
}

fn diesel_type(postgres: &str) -> String {
    let known = match postgres {
        "bool" => "Bool",
        "bytea" => "Bytea",
        "int4" => "Int4",
        "int8" => "Int8",
        "jsonb" => "Jsonb",
        "text" => "Text",
        "timestamptz" => "Timestamptz",
        "uuid" => "Uuid",
        array => match array.strip_prefix('_') {
            Some(element) => return format!("Array<{}>", diesel_type(element)),
            None => panic!("teach this test the type {array}"),
        },
    };
    known.to_owned()
}
