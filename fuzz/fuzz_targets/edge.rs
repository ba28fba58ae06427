//! What the network can say before anybody is authenticated: credentials, messages, headers, names.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    tollkeeper::auth::fuzzing::credential(data);
    tollkeeper::grpc::fuzzing::call(data);
});
