//! What `users import` reads: a pipeline that breaks, and files that are not what they should be.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    process::{ChildStdin, Stdio},
};

use nix::sys::signal::Signal;

use super::{
    Service,
    home::Home,
    import::{blocking, count, is_running, number, run},
};
use crate::harness::cluster;

/// Three rows, the last cut within its address.
const CUT: &str = "email,username\nada@example.com,ada\nbob@example.com,bob\ngrace@example.co";
const PIPED: [&str; 7] = [
    "users", "import", "-", "--format", "csv", "--source", "people",
];

/// Starts an import from standard input and writes to it, without an end.
fn piped(home: &Home, input: &str) -> (Service, ChildStdin) {
    let mut command = home.production(&PIPED);
    command.stdin(Stdio::piped());
    let mut import = home.start(command);
    let mut stdin = import.child.stdin.take().expect("piped");
    stdin.write_all(input.as_bytes()).expect("reads");
    (import, stdin)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pipeline_had_sent_when_it_was_interrupted_is_not_taken_for_all() {
    let home = blocking(Home::with_database);
    let migrated = blocking(|| run(&home, &["migrate", "up"], ""));
    assert_eq!(migrated.code, Some(0), "{}", migrated.stderr);
    let client = cluster::connect(home.database_url()).await;
    blocking(|| {
        // The end is there, and then the signal, as when all of a pipeline gets it.
        let (mut import, stdin) = piped(&home, CUT);
        import.wait_until("it waits for signals", |import| {
            waits_for_signals(import.child.id())
        });
        import.signal(Signal::SIGINT);
        drop(stdin);
        let ended = import.ended();
        assert_eq!(ended.code(), Some(1), "{}", import.log());
        let log = import.log();
        assert!(log.contains("interrupted behind line 0"), "{log}");
    });
    assert_eq!(count(&client, "users").await, 0);

    blocking(|| {
        let (mut import, stdin) = piped(&home, CUT);
        import.wait_until("it waits for signals", |import| {
            waits_for_signals(import.child.id())
        });
        import.signal(Signal::SIGTERM);
        import.wait_until("it was asked to", |import| {
            import.log().contains("once more")
        });
        // It still waits for the rest of its input.
        assert!(is_running(&mut import), "{}", import.log());
        let ended = import.stop(Signal::SIGINT);
        assert_eq!(ended.code(), Some(130), "{}", import.log());
        drop(stdin);
    });
    assert_eq!(count(&client, "users").await, 0);

    // Nobody was asked, but the writer died: its last row is none.
    for (input, line) in [
        (CUT, 4),
        ("email,username\nada@example.com,ada\nbob@example.com,bo", 3),
    ] {
        let cut = blocking(|| run(&home, &PIPED, input));
        assert_eq!(cut.code, Some(1));
        let says = format!("line {line}: has no line end");
        assert!(cut.stderr.contains(&says), "{}", cut.stderr);
    }
    let users = "users WHERE email IN ('ada@example.com', 'bob@example.com')";
    assert_eq!(count(&client, "users").await, 2);
    assert_eq!(count(&client, users).await, 2);
    let whole = blocking(|| run(&home, &PIPED, &format!("{CUT}m,grace\n")));
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    assert_eq!(number(&whole.stdout, "imported"), 1);
}

/// Whether a process has handlers of its own for SIGINT and SIGTERM, which come one after the other.
fn waits_for_signals(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.map(|mask| u64::from_str_radix(mask.trim(), 16).expect("a mask"));
    let handles =
        |signal: Signal| caught.is_some_and(|mask| mask & (1 << (signal as i32 - 1)) != 0);
    handles(Signal::SIGINT) && handles(Signal::SIGTERM)
}

#[test]
fn broken_rows_are_not_written_over_the_file_they_are_in() {
    let home = Home::with_database();
    let path = |name: &str| home.path().join(name);
    let people = "email,username\nada,ada\n";
    fs::write(path("people.csv"), people).unwrap();
    fs::hard_link(path("people.csv"), path("linked.csv")).unwrap();
    symlink("people.csv", path("symbolic.csv")).unwrap();
    for errors in ["people.csv", "linked.csv", "symbolic.csv"] {
        let args = ["users", "import", "people.csv", "--errors", errors];
        let refused = run(&home, &args, "");
        let says = "--errors is the file to import";
        assert_eq!(refused.code, Some(1));
        assert!(refused.stderr.contains(says), "{}", refused.stderr);
    }
    let mut redirected = home.production(&[&PIPED[..], &["--errors", "people.csv"]].concat());
    redirected.stdin(fs::File::open(path("people.csv")).unwrap());
    assert_eq!(home.start(redirected).ended().code(), Some(1));
    assert_eq!(fs::read_to_string(path("people.csv")).unwrap(), people);

    // Those of the run before are there until there is a database to import to.
    let args = ["users", "import", "people.csv", "--errors", "errors.csv"];
    assert_eq!(run(&home, &args, "").code, Some(1));
    let errors = fs::read_to_string(path("errors.csv")).unwrap();
    assert!(errors.contains("2,INVALID_FIELD,email,"), "{errors}");
    let mut away = home.production(&args);
    away.env("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nothing");
    assert_eq!(home.finish(away, "").code, Some(1));
    assert_eq!(fs::read_to_string(path("errors.csv")).unwrap(), errors);
}

#[test]
fn an_import_does_not_read_on_behind_a_row_that_cannot_be_read() {
    let home = Home::with_database();
    let unreadable = "x\n".repeat(5000);
    let people = format!("email,username\nada@example.com,ada\n{unreadable}");
    fs::write(home.path().join("people.csv"), people).unwrap();
    let args = ["users", "import", "people.csv", "--on-error", "stop"];
    let stopped = run(&home, &args, "");
    assert_eq!(stopped.code, Some(1));
    assert_eq!(number(&stopped.stdout, "imported"), 1, "{}", stopped.stderr);
    assert_eq!(number(&stopped.stdout, "broken"), 1, "{}", stopped.stderr);
    let says = "stopped behind line 3";
    assert!(stopped.stderr.contains(says), "{}", stopped.stderr);
}
