require_relative '../../../lib/community/app_handler'

# What every SuperNode appliance is certified for. The SuperLink of metadata.yaml does not answer: the node runs all the same
# and tries again for ever.
describe 'Appliance Certification' do
    include_context('vm_handler')

    # Asks until the answer is a wanted one, or the time is over.
    def answer_of(command, wanted, seconds)
        limit = Time.now + seconds
        loop do
            answer = @info[:vm].ssh(command).stdout.to_s.strip
            return answer if answer.match?(wanted) || Time.now > limit

            sleep 5
        end
    end

    it 'flower-supernode service is active' do
        expect(answer_of('systemctl is-active flower-supernode.service', /\Aactive\z/, 600)).to eq('active')
    end

    it 'docker service is running' do
        expect(answer_of('systemctl is-active docker.service', /\Aactive\z/, 60)).to eq('active')
    end

    it 'flower-supernode container is running' do
        expect(answer_of("docker inspect -f '{{.State.Running}}' flower-supernode", /\Atrue\z/, 120)).to eq('true')
    end

    # The unit is the package's.
    it 'flower-supernode systemd unit file exists' do
        @info[:vm].ssh('systemctl cat flower-supernode.service').expect_success
    end

    it 'service report file exists' do
        @info[:vm].ssh('test -s /etc/one-appliance/config').expect_success
    end

    it 'check oneapps motd' do
        expect(answer_of('cat /etc/motd', /All set and ready to serve/, 600)).to include('All set and ready to serve')
    end
end
