//! Server reflection, in both versions that clients speak.

use prost::Message as _;
use prost_types::FileDescriptorProto;

use crate::{descriptor, harness::TestApp};

/// Asks a version of reflection one question.
macro_rules! ask {
    ($app:expr, $version:ident, $request:expr) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        };
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some($request),
        };
        let mut client = ServerReflectionClient::new($app.channel.clone());
        let answers = client
            .server_reflection_info(tokio_stream::once(request))
            .await;
        let answer = answers.expect("opened").into_inner().message().await;
        answer
            .expect("answered")
            .expect("an answer")
            .message_response
            .expect("an answer")
    }};
}

macro_rules! tests {
    ($version:ident) => {
        mod $version {
            use tonic_reflection::pb::$version::{
                server_reflection_request::MessageRequest,
                server_reflection_response::MessageResponse,
            };

            use super::*;

            #[tokio::test(flavor = "multi_thread")]
            async fn lists_every_service_to_anyone() {
                let app = TestApp::spawn().await;
                let request = MessageRequest::ListServices(String::new());
                let MessageResponse::ListServicesResponse(list) = ask!(app, $version, request)
                else {
                    panic!("not a list");
                };
                let names: Vec<String> = list.service.into_iter().map(|s| s.name).collect();
                for service in our_services() {
                    assert!(names.contains(&service), "{service} is not in {names:?}");
                }
                assert!(
                    names.contains(&"grpc.health.v1.Health".to_owned()),
                    "{names:?}"
                );
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn describes_every_service() {
                let app = TestApp::spawn().await;
                for service in our_services() {
                    let request = MessageRequest::FileContainingSymbol(service.clone());
                    let MessageResponse::FileDescriptorResponse(files) =
                        ask!(app, $version, request)
                    else {
                        panic!("no file for {service}");
                    };
                    assert!(
                        describes(&files.file_descriptor_proto, &service),
                        "{service}"
                    );
                }
            }
        }
    };
}

tests!(v1);
tests!(v1alpha);

fn our_services() -> Vec<String> {
    let rpcs = descriptor::rpcs();
    let name = |path: &str| {
        path.trim_start_matches('/')
            .split('/')
            .next()
            .map(str::to_owned)
    };
    let mut services: Vec<String> = rpcs.iter().filter_map(|rpc| name(&rpc.path)).collect();
    services.dedup();
    assert!(services.len() >= 3, "{services:?}");
    services
}

fn describes(files: &[Vec<u8>], service: &str) -> bool {
    files.iter().any(|bytes| {
        let file = FileDescriptorProto::decode(bytes.as_slice()).expect("a descriptor");
        let package = file.package().to_owned();
        let mut services = file.service.iter();
        services.any(|found| format!("{package}.{}", found.name()) == service)
    })
}
