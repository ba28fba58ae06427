//! `users import`, also when it is killed on the way.
//!
//! Another number of rows:
//!
//! ```text
//! TOLLKEEPER_TEST_IMPORT_ROWS=1000000 scripts/test --no-capture -E 'test(process::import::)'
//! ```

use std::{
    fmt::Write as _,
    fs,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_postgres::Client;

use super::{
    Service,
    home::{Home, Outcome},
};
use crate::{
    auth::python::python,
    harness::{cluster, login_through},
};

const ROWS: usize = 100_000;
const KILLS: usize = 3;

/// One row of so many is broken.
const BROKEN: usize = 100;

/// One of so many logs in at the end.
const PEOPLE_OF_A_SCHEME: usize = 4;

/// For each person a password and its hashes, of a cost below what the service is set to.
const HASHES: &str = r#"
import json, sys
import argon2, bcrypt
from passlib.hash import sha512_crypt

hasher = argon2.PasswordHasher(time_cost=1, memory_cost=32, parallelism=1)
argon2i = argon2.PasswordHasher(time_cost=1, memory_cost=32, parallelism=1, type=argon2.Type.I)
make = [
    lambda text: bcrypt.hashpw(text.encode(), bcrypt.gensalt(4)).decode(),
    lambda text: bcrypt.hashpw(text.encode(), bcrypt.gensalt(4, prefix=b"2a")).decode(),
    hasher.hash,
    argon2i.hash,
    sha512_crypt.using(rounds=1000).hash,
]
people = [(f"password {number} of theirs", make[number % len(make)])
          for number in range(json.load(sys.stdin) * len(make))]
json.dump([{"password": text, "hash": of(text)} for text, of in people], sys.stdout)
"#;

/// A password and its hash.
struct Known {
    password: String,
    hash: String,
}

fn known() -> Vec<Known> {
    let Value::Array(people) = python(HASHES, &json!(PEOPLE_OF_A_SCHEME)) else {
        panic!("not a list");
    };
    let text = |person: &Value, name: &str| person[name].as_str().expect("text").to_owned();
    let one = |person: &Value| Known {
        password: text(person, "password"),
        hash: text(person, "hash"),
    };
    people.iter().map(one).collect()
}

/// A file of rows, every hundredth of them broken in one way or another.
fn file(rows: usize, known: &[Known]) -> String {
    let mut file = String::from("email,username,password_hash,tier,created_at,is_active\n");
    for row in 0..rows {
        let (mut email, mut tier) = (format!("person-{row}@example.com"), "free");
        let mut hash = known[row % known.len()].hash.clone();
        if row % BROKEN == BROKEN - 1 {
            match row / BROKEN % 4 {
                0 => email = format!("person-{row}"),
                1 => hash = "plain text".to_owned(),
                2 => "$2b$31$9dBEZ2HpoiKFWz3mlWUcLe23YxjQgfL1O4O1s1FHCWYV9mBzYoKgK"
                    .clone_into(&mut hash),
                _ => tier = "gold",
            }
        }
        writeln!(
            file,
            "{email},person-{row},\"{hash}\",{tier},2024-03-01 12:00:00+00,true"
        )
        .expect("text");
    }
    file
}

/// The value behind a label such as `imported  …`.
#[track_caller]
pub(super) fn number(output: &str, label: &str) -> usize {
    let mut lines = output.lines();
    let found = lines
        .find_map(|line| line.strip_prefix(label))
        .expect(label);
    found.trim().replace(',', "").parse().expect("a number")
}

pub(super) async fn count(client: &Client, what: &str) -> usize {
    let statement = format!("SELECT count(*) FROM {what}");
    let row = client.query_one(&statement, &[]).await.expect("counted");
    let count: i64 = row.get(0);
    usize::try_from(count).expect("positive")
}

const IMPORT: [&str; 3] = ["users", "import", "people.csv"];

pub(super) fn blocking<T: Send + 'static>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_killed_again_and_again_imports_each_once_and_they_log_in() {
    let asked = std::env::var("TOLLKEEPER_TEST_IMPORT_ROWS").ok();
    let rows: usize = asked.map_or(ROWS, |rows| rows.parse().expect("a number"));
    let broken = rows / BROKEN;
    let good = rows - broken;
    let (home, known) = blocking(|| (Home::with_database(), known()));
    fs::write(home.path().join("people.csv"), file(rows, &known)).unwrap();
    let migrated = blocking(|| home.finish(home.production(&["migrate", "up"]), ""));
    assert_eq!(migrated.code, Some(0), "{}", migrated.stderr);
    let client = cluster::connect(home.database_url()).await;

    let mut killed = 0;
    for kill in 1..=KILLS {
        let mut import = home.start(home.production(&IMPORT));
        let enough = good * kill / (KILLS + 1);
        if !reach(&client, &mut import, enough).await {
            // Who watches was held up for longer than all of it takes.
            println!("ended before it was killed");
            break;
        }
        let ended = blocking(|| import.stop(Signal::SIGKILL));
        killed += usize::from(ended.code().is_none());
        assert!(count(&client, "users").await >= enough);
    }
    assert!(killed > 0, "none was under way");

    let already = count(&client, "users").await;
    let begun = Instant::now();
    let args = [&IMPORT[..], &["--errors", "errors.csv"]].concat();
    let finished = blocking(|| home.finish(home.production(&args), ""));
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    assert_eq!(number(&finished.stdout, "broken"), broken);
    let (imported, before) = (
        number(&finished.stdout, "imported"),
        number(&finished.stdout, "already there"),
    );
    assert_eq!(imported + before, good);
    // What the last one killed had on its way may have been committed meanwhile.
    assert!(before >= already, "{before} of {already}");
    println!(
        "{rows} rows, {imported} of them new, in {:.1} s",
        begun.elapsed().as_secs_f64()
    );

    let errors = fs::read_to_string(home.path().join("errors.csv")).unwrap();
    assert_eq!(
        errors.lines().count(),
        broken + 1,
        "one field is wrong of each"
    );
    // Behind the header.
    assert!(errors.contains("\n101,INVALID_FIELD,email,"));
    for secret in ["plain text", "person-", "$2b$", "gold"] {
        assert!(
            !errors.contains(secret) && !finished.stderr.contains(secret),
            "{secret}"
        );
    }
    assert_eq!(count(&client, "users").await, good);
    assert_eq!(
        count(&client, "(SELECT DISTINCT lower(email) FROM users) AS u").await,
        good
    );
    assert_eq!(
        count(&client, "audit_events WHERE action = 'user.imported'").await,
        good
    );
    assert_eq!(
        count(
            &client,
            "(SELECT DISTINCT target_id FROM audit_events) AS e"
        )
        .await,
        good
    );

    // Once more: nothing is left to do.
    let begun = Instant::now();
    let again = blocking(|| home.finish(home.production(&IMPORT), ""));
    assert_eq!(
        (
            number(&again.stdout, "imported"),
            number(&again.stdout, "already there")
        ),
        (0, good)
    );
    println!(
        "{rows} rows, none of them new, in {:.1} s",
        begun.elapsed().as_secs_f64()
    );

    let mut service = home.start(home.production(&["serve"]));
    let channel = service.serving().await;
    for (number, Known { password, hash }) in known.iter().enumerate() {
        let name = format!("person-{number}");
        login_through(&channel, &name, password).await.expect(hash);
        assert!(
            login_through(&channel, &name, "not the password")
                .await
                .is_err()
        );
        let statement = "SELECT password_hash FROM users WHERE username = $1";
        let stored: String = client.query_one(statement, &[&name]).await.unwrap().get(0);
        assert!(
            stored.starts_with("$argon2id$v=19$m=7168,"),
            "{hash}: {stored}"
        );
        login_through(&channel, &name, password)
            .await
            .expect("rehashed");
    }
}

/// Waits until there are so many users; whether the import is still under way then.
async fn reach(client: &Client, import: &mut Service, enough: usize) -> bool {
    let deadline = Instant::now() + Duration::from_secs(300);
    let before = count(client, "users").await;
    // When the first batch is there.
    let mut first: Option<(Instant, usize)> = None;
    loop {
        let now = count(client, "users").await;
        if now > before {
            let (at, first) = *first.get_or_insert_with(|| (Instant::now(), now));
            if now >= enough {
                let rate = (now - first) as f64 / at.elapsed().as_secs_f64().max(0.001);
                println!("{now} users, {rate:.0} new rows/s");
                return is_running(import);
            }
        }
        if !is_running(import) {
            return false;
        }
        assert!(Instant::now() < deadline, "{}", import.log());
        sleep(Duration::from_millis(20)).await;
    }
}

pub(super) fn is_running(service: &mut Service) -> bool {
    service.child.try_wait().expect("a child").is_none()
}

pub(super) fn run(home: &Home, args: &[&str], input: &str) -> Outcome {
    home.finish(home.production(args), input)
}

#[test]
fn a_file_is_not_checked_against_a_database_that_is_nobodys() {
    let home = Home::new();
    fs::write(home.path().join("people.csv"), "email,username\n").unwrap();
    let args = ["users", "import", "people.csv", "--dry-run"];
    let refused = home.run(&args);
    assert_eq!(refused.code, Some(1));
    let why = "there is no database in";
    assert!(refused.stderr.contains(why), "{}", refused.stderr);
    assert!(!home.data_dir().join("postgres").exists());
}

#[test]
fn a_file_is_checked_without_writing_and_imported_from_standard_input() {
    let home = Home::with_database();
    let lines = [
        r#"{"id": "3f2c8a10-9b1d-4e5f-8a7b-1c2d3e4f5061", "email": "ada@example.com", "username": "ada"}"#,
        r#"{"email": "bob@example.com", "username": "ada", "is_verified": true}"#,
        r#"{"email": "eve@example.com", "username": "eve", "role": "admin"}"#,
        "",
        "{not json",
        r#"{"email": "joe@example.com", "username": "joe", "is_active": null}"#,
        "",
    ]
    .join("\n");
    fs::write(home.path().join("people.jsonl"), &lines).unwrap();
    let args = [
        "users",
        "import",
        "people.jsonl",
        "--errors",
        "errors.jsonl",
    ];
    let dry = [&args[..], &["--dry-run"]].concat();
    // A check makes no schema either.
    let refused = run(&home, &dry, "");
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.stderr.contains("run `tollkeeper migrate up` first"),
        "{}",
        refused.stderr
    );
    let migrated = run(&home, &["migrate", "up"], "");
    assert_eq!(migrated.code, Some(0), "{}", migrated.stderr);
    let checked = run(&home, &dry, "");
    assert_eq!(checked.code, Some(1));
    assert_eq!(
        number(&checked.stdout, "to import"),
        2,
        "{}",
        checked.stderr
    );
    assert_eq!(number(&checked.stdout, "broken"), 3);
    assert!(
        checked.stderr.contains("line 5: is not a JSON object"),
        "{}",
        checked.stderr
    );
    assert!(
        checked.stderr.contains("line 3: role must not be admin"),
        "{}",
        checked.stderr
    );
    assert!(
        checked.stderr.contains("3 rows are broken"),
        "{}",
        checked.stderr
    );
    let errors = fs::read_to_string(home.path().join("errors.jsonl")).unwrap();
    let mut errors: Vec<Value> = errors
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    errors.sort_by_key(|error| error["line"].as_i64());
    let named: Vec<_> = errors
        .iter()
        .map(|error| (&error["line"], &error["reason"], &error["field"]))
        .map(|(line, reason, field)| format!("{line} {reason} {field}"))
        .collect();
    assert_eq!(
        named,
        [
            r#"2 "DUPLICATE_ROW" "username""#,
            r#"3 "INVALID_FIELD" "role""#,
            r#"5 "INVALID_FIELD" """#,
        ]
    );

    // Nothing was written: all is to be imported still, now from standard input.
    let piped = [
        "users", "import", "-", "--format", "jsonl", "--source", "people",
    ];
    let imported = run(&home, &[&piped[..], &["--allow-admins"]].concat(), &lines);
    assert_eq!(
        number(&imported.stdout, "imported"),
        3,
        "{}",
        imported.stderr
    );
    // By the same source, it is the same import.
    let again = run(&home, &args, "");
    assert_eq!(
        number(&again.stdout, "already there"),
        2,
        "{}",
        again.stderr
    );
    let mended = lines.replace("\"ada\", \"is_ver", "\"bob\", \"is_ver");
    let mended = mended.replace("{not json", "");
    let piped = [&piped[..], &["--allow-admins"]].concat();
    let mended = run(&home, &piped, &mended);
    assert_eq!(mended.code, Some(0), "{}", mended.stderr);
    assert_eq!(number(&mended.stdout, "imported"), 1, "{}", mended.stderr);
}

#[test]
fn what_is_wrong_with_a_file_or_a_flag_is_said_before_anything_is_done() {
    let home = Home::new();
    let write = |name: &str, text: &str| fs::write(home.path().join(name), text).unwrap();
    write("password.csv", "email,username,password\n");
    write("twice.csv", "id,user_id,email,username\n");
    write("people.txt", "email,username\n");
    write("no one.csv", "email,username\n");
    for (args, says) in [
        (&["password.csv"][..], "the column \"password\" is unknown"),
        (&["twice.csv"], "the column user_id is there twice"),
        (&["people.txt"], "--format is needed"),
        (
            &["no one.csv"],
            "--source is needed: the file's name cannot",
        ),
        (&["no one.csv", "--source", "no one"], "--source must be"),
        (&["-", "--format", "csv"], "--source is needed"),
        (&["missing.csv"], "cannot read missing.csv"),
    ] {
        let outcome = home.run(&[&["users", "import"], args].concat());
        assert_ne!(outcome.code, Some(0));
        assert!(outcome.stderr.contains(says), "{says}: {}", outcome.stderr);
    }
    assert!(!home.data_dir().exists(), "no database was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_stops_at_a_broken_row_or_when_asked_to_and_goes_on_later() {
    let (home, known) = blocking(|| (Home::with_database(), known()));
    fs::write(home.path().join("people.csv"), file(20_000, &known)).unwrap();
    let stop = [&IMPORT[..], &["--on-error", "stop"]].concat();
    let stopped = blocking(|| run(&home, &stop, ""));
    assert_eq!(stopped.code, Some(1));
    assert_eq!(
        number(&stopped.stdout, "imported"),
        495,
        "{}",
        stopped.stderr
    );
    assert!(
        stopped.stderr.contains("stopped behind line 501"),
        "{}",
        stopped.stderr
    );

    let client = cluster::connect(home.database_url()).await;
    let mut import = home.start(home.production(&IMPORT));
    while count(&client, "users").await < 1000 {
        assert!(is_running(&mut import), "{}", import.log());
        sleep(Duration::from_millis(2)).await;
    }
    let ended = blocking(|| import.stop(Signal::SIGINT));
    assert_eq!(ended.code(), Some(1), "{}", import.log());
    assert!(
        import
            .log()
            .contains("to go on, run the same command again"),
        "{}",
        import.log()
    );
    let done = number(&import.output(), "imported") + number(&import.output(), "already there");
    assert_eq!(count(&client, "users").await, done);
    assert!(done < 19_800, "all was done before");

    let finished = blocking(|| run(&home, &IMPORT, ""));
    assert_eq!(number(&finished.stdout, "already there"), done);
    assert_eq!(count(&client, "users").await, 19_800);
    assert!(
        finished.stderr.contains("and 180 more; --errors FILE"),
        "{}",
        finished.stderr
    );
}
