//! Somebody is left to administer, whatever administrators do to each other.

use prost_types::FieldMask;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        DeleteUserRequest, DisableUserRequest, UpdateUserRequest,
        admin_service_client::AdminServiceClient,
    },
    auth::v1::{Role, User},
};
use tonic::{Code, Status, transport::Channel};

use super::assert_refused;
use crate::harness::{Blocker, TestApp, with_bearer};

/// What makes an administrator none.
#[derive(Clone, Copy, Debug)]
enum Act {
    Demote,
    Disable,
    Delete,
}

const ACTS: [Act; 3] = [Act::Demote, Act::Disable, Act::Delete];

async fn act(channel: &Channel, key: &str, act: Act, id: &str) -> Result<(), Status> {
    let mut admin = AdminServiceClient::new(channel.clone());
    let (user_id, reason) = (id.to_owned(), String::new());
    match act {
        Act::Demote => {
            let user = User {
                id: user_id,
                role: Role::User.into(),
                ..User::default()
            };
            let request = UpdateUserRequest {
                user: Some(user),
                update_mask: Some(FieldMask {
                    paths: vec!["role".to_owned()],
                }),
            };
            admin.update_user(with_bearer(request, key)).await.map(drop)
        }
        Act::Disable => {
            let request = DisableUserRequest { user_id, reason };
            admin
                .disable_user(with_bearer(request, key))
                .await
                .map(drop)
        }
        Act::Delete => {
            let request = DeleteUserRequest { user_id, reason };
            admin.delete_user(with_bearer(request, key)).await.map(drop)
        }
    }
}

/// From now on these are the only administrators.
async fn only(app: &TestApp, ids: &[&str]) {
    let ids: Vec<String> = ids.iter().map(|id| format!("'{id}'")).collect();
    app.sql(&format!(
        "UPDATE users SET role = 'user' WHERE id NOT IN ({})",
        ids.join(", ")
    ))
    .await;
}

const ACTIVE: &str = "SELECT count(*) FROM users WHERE role = 'admin' AND is_active";

#[tokio::test(flavor = "multi_thread")]
async fn the_last_administrator_stays() {
    let app = TestApp::spawn().await;
    let key = &app.service_key;
    let (last, off) = (
        app.user().admin().create().await,
        app.user().admin().create().await,
    );
    only(&app, &[&last.id, &off.id]).await;
    app.disable(&off.id).await;
    for what in ACTS {
        // One who is turned off administers nothing.
        let refused = act(&app.channel, key, what, &last.id).await;
        assert_refused(refused, Code::FailedPrecondition, "LAST_ADMIN");
    }
    let untouched = "SELECT count(*) FROM audit_events WHERE action IN \
         ('user.role_set', 'user.deleted') OR action = 'user.disabled' AND target_id = actor_id";
    assert_eq!(app.count(untouched).await, 0);
    app.login(&last).await;
    // Others of them may go, and so may the last one once there is another.
    for what in [Act::Demote, Act::Disable, Act::Delete] {
        act(&app.channel, key, what, &off.id).await.unwrap();
    }
    for what in ACTS {
        let further = app.user().admin().create().await;
        act(&app.channel, key, what, &further.id).await.unwrap();
    }
    app.user().admin().create().await;
    act(&app.channel, key, Act::Delete, &last.id).await.unwrap();
    assert_eq!(app.count(ACTIVE).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_remove_each_other_one_stays() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    for first in ACTS {
        for second in ACTS {
            let (one, other) = (
                app.user().admin().create().await,
                app.user().admin().create().await,
            );
            only(&app, &[&one.id, &other.id]).await;
            // The first has asked whether there is another, and waits with its last word.
            let blocker = Blocker::lock(&app, "audit_events").await;
            let spawn = |channel: Channel, what, id: &str| {
                let (key, id) = (app.service_key.clone(), id.to_owned());
                tokio::spawn(async move { act(&channel, &key, what, &id).await })
            };
            let removing = spawn(app.channel.clone(), first, &other.id);
            blocker.hold_up(&app, 1).await;
            let losing = spawn(replica.channel(), second, &one.id);
            blocker.hold_up(&app, 2).await;
            blocker.release().await;
            removing.await.unwrap().unwrap();
            let refused = losing.await.unwrap();
            assert_refused(refused, Code::FailedPrecondition, "LAST_ADMIN");
            assert_eq!(app.count(ACTIVE).await, 1, "{first:?} {second:?}");
        }
    }
}
