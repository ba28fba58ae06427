//! Other people's implementations, by way of Python.

use std::{
    env,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use serde_json::Value;

/// Runs a script that reads JSON from standard input and prints JSON.
///
/// # Panics
/// When there is no Python with the packages of `scripts/requirements.txt`: a test that needs them
/// must not pass without.
pub(crate) fn python(script: &str, input: &Value) -> Value {
    let python = env::var_os("TOLLKEEPER_TEST_PYTHON").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin/python"),
        PathBuf::from,
    );
    let mut child = Command::new(&python)
        .args(["-W", "ignore", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!(
                "no Python at {}: {error}; scripts/test makes one, or let TOLLKEEPER_TEST_PYTHON \
                 name one with the packages of scripts/requirements.txt",
                python.display()
            )
        });
    let mut stdin = child.stdin.take().expect("piped");
    // A script that fails early closes the pipe; its own words say more.
    let _ = stdin.write_all(input.to_string().as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("ended");
    assert!(
        output.status.success(),
        "{} needs the packages of scripts/requirements.txt (scripts/test installs them): {}",
        python.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("JSON")
}
